"""Telemetry of a coordinator for an MQTT broker: state of the model, events of the cluster."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Any

from coordinator.fleet.members import Members
from coordinator.serving.gateway import Gateway
from coordinator.serving.service import Service
from unicluster import __version__
from unicluster.cluster.background import going_on
from unicluster.telemetry.home_assistant import Sensor, discovery
from unicluster.telemetry.mqtt import Publisher
from unicluster.telemetry.rate import Rate

LOOK_SECONDS = 0.5
READ_SECONDS = 10.0


def root_of(model: str) -> str:
    """Root of a model's topics, below the prefix."""
    return f"model/{_plain(model)}"


async def publish_telemetry(
    gateway: Gateway, service: Service, members: Members, publisher: Publisher, coordinator: str
) -> None:
    """Publishes until cancelled."""
    _introduce(service.display, publisher)
    published = Published(machines=frozenset(members.names))
    events = f"{publisher.url.prefix}/events"
    rate = Rate(gateway.tokens)
    while True:
        with going_on("telemetry"):
            state = state_of(service, coordinator)
            publisher.state(publisher.topic("state"), state)
            for event in published.news(state, frozenset(members.names)):
                publisher.event(events, {"time": round(time.time(), 3), **event})
            if rate.seconds >= READ_SECONDS:
                readings = readings_of(rate.next(gateway.tokens), gateway.running)
                publisher.event(publisher.topic("readings"), readings)
        await asyncio.sleep(LOOK_SECONDS)


def state_of(service: Service, coordinator: str) -> dict[str, Any]:
    """See docs/mqtt.schema.json, as for all payloads here."""
    plan = service.deployment.plan if service.deployment is not None else None
    stages = plan.stages if plan is not None else ()
    return {
        "model": service.display,
        "coordinator": coordinator,
        "version": __version__,
        "state": service.state,
        "detail": service.detail,
        "cause": service.cause,
        "quant": service.layout.quant,
        "context": service.layout.context,
        "users": service.layout.users,
        "stages": [
            {"machine": s.machine.name, "first_layer": s.first, "end_layer": s.end} for s in stages
        ],
    }


def readings_of(tokens_per_s: float, running: int) -> dict[str, Any]:
    return {
        "time": round(time.time(), 3),
        "tokens_per_s": tokens_per_s,
        "answers": running,
    }


@dataclass
class Published:
    """The state that was published last."""

    machines: frozenset[str]
    state: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)

    def news(self, state: dict[str, Any], machines: frozenset[str]) -> list[dict[str, Any]]:
        """Events that lead from the published state to the current one, which it becomes."""
        events: list[dict[str, Any]] = []
        events += [{"event": "node_joined", "node": n} for n in sorted(machines - self.machines)]
        events += [{"event": "node_left", "node": n} for n in sorted(self.machines - machines)]
        of_model = {"model": state["model"]}
        if state["stages"] and state["stages"] != self.stages:
            events.append({"event": "plan_changed", **of_model, "stages": state["stages"]})
            self.stages = state["stages"]
        if state["state"] != self.state:
            detail = {name: state[name] for name in ("state", "detail", "cause")}
            events.append({"event": "state_changed", **of_model, **detail})
            self.state = state["state"]
        self.machines = machines
        return events


def _introduce(model: str, publisher: Publisher) -> None:
    if not publisher.url.discovery:
        return
    state, readings = publisher.topic("state"), publisher.topic("readings")
    machines = "{{ value_json.stages | map(attribute='machine') | join(', ') }}"
    rate, answers = "{{ value_json.tokens_per_s }}", "{{ value_json.answers }}"
    sensors = [
        Sensor("state", "State", state, "{{ value_json.state }}", measured=False),
        Sensor("machines", "Machines", state, machines, measured=False),
        Sensor("tokens_per_s", "Tokens per second", readings, rate, unit="tokens/s"),
        Sensor("answers", "Answers", readings, answers),
    ]
    unique = f"unicluster_model_{_plain(model)}"
    payload = discovery(unique, model, "language model", publisher.status_topic, sensors)
    publisher.state(f"{publisher.url.discovery}/device/{unique}/config", payload)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "model"
