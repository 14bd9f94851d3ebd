"""The telemetry that a machine's agent publishes over MQTT."""

import asyncio
import time
from typing import Any

from node.agent.agent import Agent
from node.agent.sensors import Thermals, read_thermals
from unicluster import PROTOCOL, __version__
from unicluster.cluster.background import going_on
from unicluster.telemetry.home_assistant import Sensor, discovery
from unicluster.telemetry.mqtt import Publisher
from unicluster.telemetry.rate import Rate

READ_SECONDS = 10.0


async def publish(agent: Agent, publisher: Publisher, name: str) -> None:
    """Publishes until cancelled: the state whenever it changes, readings every 10 s."""
    _introduce(agent, publisher, name)
    due = 0.0
    rate = Rate(agent.computed_tokens)
    while True:
        publisher.state(publisher.topic("state"), state_of(agent, name))
        if time.monotonic() >= due:
            due = time.monotonic() + READ_SECONDS
            with going_on("telemetry"):
                usable, thermals = await asyncio.to_thread(
                    lambda: (agent.usable_memory(), read_thermals())
                )
                tokens_per_s = rate.next(agent.computed_tokens)
                readings = readings_of(agent, usable, thermals, tokens_per_s)
                publisher.event(publisher.topic("readings"), readings)
        await agent.changed(due - time.monotonic())


def state_of(agent: Agent, name: str) -> dict[str, Any]:
    """State of the agent, as docs/mqtt.schema.json describes it, like all payloads here."""
    hardware = agent.hardware
    return {
        "name": name,
        "chip": hardware.chip,
        "backend": hardware.backend,
        "platform": hardware.platform,
        "version": __version__,
        "protocol": PROTOCOL,
        "total_memory": hardware.total_memory,
        "draining": agent.draining,
        "stages": [
            {
                "model": spec.model,
                "first_layer": spec.first_layer,
                "end_layer": spec.end_layer,
                "memory": spec.memory,
            }
            for spec in agent.stages
        ],
    }


def readings_of(
    agent: Agent, usable: int, thermals: Thermals, tokens_per_s: float
) -> dict[str, Any]:
    stages = [f"{s.model} {s.first_layer}-{s.end_layer - 1}" for s in agent.stages]
    return {
        "time": round(time.time(), 3),
        "usable_memory": usable,
        "stage": ", ".join(stages) or "none",
        "tokens_per_s": tokens_per_s,
        "temperature": thermals.celsius,
        "power": thermals.watts,
    }


def _introduce(agent: Agent, publisher: Publisher, name: str) -> None:
    if not publisher.url.discovery:
        return
    readings = publisher.topic("readings")
    gigabytes = "{{ (value_json.usable_memory / 1e9) | round(1) }}"
    rate = "{{ value_json.tokens_per_s }}"
    sensors = [
        Sensor("memory", "Memory to offer", readings, gigabytes, "data_size", "GB"),
        Sensor("stage", "Stage", readings, "{{ value_json.stage }}", measured=False),
        Sensor("tokens_per_s", "Tokens per second", readings, rate, unit="tokens/s"),
        Sensor("temperature", "Temperature", readings, _value("temperature"), "temperature", "°C"),
        Sensor("power", "Power", readings, _value("power"), "power", "W"),
    ]
    unique = f"unicluster_node_{name}"
    payload = discovery(unique, name, agent.hardware.chip, publisher.status_topic, sensors)
    publisher.state(f"{publisher.url.discovery}/device/{unique}/config", payload)


def _value(key: str) -> str:
    """Template of a reading: unknown, not 0, where the platform does not report it."""
    return f"{{{{ value_json.{key} if value_json.{key} is not none else None }}}}"
