"""Telemetry, through a real broker: Mosquitto, where it is installed."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.brokers import COORDINATOR, PASSWORD, Ear, Mosquitto, connected, listening
from tests.support.cluster import HOST, ROOT, LocalCluster, endless_model, until
from unicluster.errors import InputError
from unicluster.telemetry.broker_url import chosen_broker, parse_broker
from unicluster.trust.store import Store

NAMES = ("ann", "bob")
# One such machine does not hold the tiny model, two do.
MEMORY = 1_100_000
SCHEMA = json.loads((ROOT / "docs" / "mqtt.schema.json").read_text())
needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto_passwd") is None, reason="mosquitto is not installed"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    Store(tmp_path / "cluster" / "home").create()
    with LocalCluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def mosquitto(tmp_path: Path, cluster: LocalCluster) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto", cluster.cluster, NAMES) as broker:
        yield broker


def check(kind: str, payload: Any) -> None:
    """Against docs/mqtt.schema.json."""
    pointer = "#/$defs/" + kind.replace("/", "~1")
    jsonschema.validate(payload, {**SCHEMA, "$ref": pointer})


def staged(ear: Ear) -> list[Any]:
    """The stages that the machines say they run."""
    return [s for name in NAMES for s in ear.last[f"lab/node/{name}/state"]["stages"]]


def rates(ear: Ear) -> list[float]:
    """The most that each machine said it computes, in tokens per second."""
    said = [[p["tokens_per_s"] for t, p in ear.all if t == f"lab/node/{n}/readings"] for n in NAMES]
    return [max(of_one, default=0.0) for of_one in said]


@needs_mosquitto
def test_machines_and_models_tell_how_they_are(
    cluster: LocalCluster, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    model = endless_model(tmp_path / "model")
    cluster.env["UNICLUSTER_MQTT"] = mosquitto.url(COORDINATOR)
    for name in NAMES:
        cluster.start_agent(name, memory=MEMORY, UNICLUSTER_MQTT=mosquitto.url(name))
    cluster.wait_for_agents()
    with listening(mosquitto.port, cluster.cluster) as ear:
        topic = "lab/model/model"
        with cluster.serve(model, "--context", "512") as server, server.client() as client:
            until(lambda: ear.last.get(f"{topic}/state", {}).get("state") == "ready", "it is ready")
            until(lambda: staged(ear), "a machine says its stage")
            assert client.chat("hello", max_tokens=50).usage.completion_tokens == 50
            until(lambda: all(rates(ear)), "both machines say how fast they are")
            until(lambda: "lab/node/ann/readings" in ear.last, "ann's readings")
            until(lambda: f"{topic}/readings" in ear.last, "the model's readings")
            online = ear.last["lab/node/ann/status"], ear.last[f"{topic}/status"]
        until(lambda: ear.last[f"{topic}/status"] == "offline", "the model says goodbye")
        cluster.agents["ann"].kill()
        until(lambda: ear.last["lab/node/ann/status"] == "offline", "the broker says ann is dead")

    assert online == ("online", "online")
    check("node/NAME/state", ear.last["lab/node/ann/state"])
    check("node/NAME/readings", ear.last["lab/node/ann/readings"])
    check("model/NAME/state", ear.last[f"{topic}/state"])
    check("model/NAME/readings", ear.last[f"{topic}/readings"])
    for where, payload in ear.all:
        if where == "lab/events":
            check("events", payload)
    assert {"plan_changed", "state_changed"} <= set(ear.events("lab/events"))


@needs_mosquitto
def test_home_assistant_finds_machines_by_itself(
    cluster: LocalCluster, mosquitto: Mosquitto
) -> None:
    cluster.start_agent("ann", UNICLUSTER_MQTT=mosquitto.url("ann"))
    config = "homeassistant/device/unicluster_node_ann/config"

    with listening(mosquitto.port, cluster.cluster) as ear:
        until(lambda: config in ear.last, "the discovery message")
    device = ear.last[config]

    assert device["dev"]["name"] == "ann"
    assert device["cmps"]["memory"]["state_topic"] == "lab/node/ann/readings"
    assert len({c["unique_id"] for c in device["cmps"].values()}) == len(device["cmps"])


@needs_mosquitto
def test_a_broker_that_restarts_is_told_everything_again(
    cluster: LocalCluster, mosquitto: Mosquitto
) -> None:
    agent = cluster.start_agent("ann", UNICLUSTER_MQTT=mosquitto.url("ann"))
    with listening(mosquitto.port, cluster.cluster) as ear:
        until(lambda: "lab/node/ann/state" in ear.last, "ann's state")

    mosquitto.stop()
    until(lambda: "retrying" in agent.err, "ann notices")
    mosquitto.start()

    with listening(mosquitto.port, cluster.cluster) as ear:
        until(lambda: ear.last.get("lab/node/ann/status") == "online", "ann is back")
    assert PASSWORD not in agent.out + agent.err


def test_an_answer_does_not_wait_for_a_broker_that_hangs(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    model = endless_model(tmp_path / "model")
    with socket.create_server((HOST, 0)) as silent:  # takes the connection, and says nothing
        cluster.env["UNICLUSTER_MQTT"] = f"mqtts://{HOST}:{silent.getsockname()[1]}"
        cluster.start_agents("ann", "bob")

        with cluster.serve(model) as server, server.client() as client:
            answer = client.chat("hello", max_tokens=20)

    assert answer.usage.completion_tokens == 20


@needs_mosquitto
def test_a_machine_speaks_of_itself_alone(cluster: LocalCluster, mosquitto: Mosquitto) -> None:
    forbidden = ["lab/node/bob/status", "lab/model/x/state", "lab/events", "elsewhere"]
    forbidden += ["homeassistant/device/unicluster_node_bob/config"]
    with (
        listening(mosquitto.port, cluster.cluster) as ear,
        connected(mosquitto.port, cluster.cluster, "ann") as ann,
    ):
        for topic in forbidden:
            ann.publish(topic, "forged", qos=1, retain=True)
        ann.publish("lab/node/ann/status", "online", qos=1)  # after the others
        until(lambda: "lab/node/ann/status" in ear.last, "what it may say is heard")

    assert set(ear.last) == {"lab/node/ann/status"}


@needs_mosquitto
def test_who_has_no_password_is_told_so_and_goes_on(
    cluster: LocalCluster, mosquitto: Mosquitto
) -> None:
    cluster.env["UNICLUSTER_MQTT"] = f"mqtts://eve:guess@{HOST}:{mosquitto.port}?ca=cluster"

    stranger = cluster.start_agent("eve")

    until(lambda: "retrying" in stranger.err, "eve is refused")
    assert stranger.running
    assert "guess" not in stranger.out + stranger.err


def test_the_password_can_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mqtt"
    file.write_text("mqtts://ann:s%23cret@broker/lab\n")
    monkeypatch.setenv("UNICLUSTER_MQTT_FILE", str(file))

    broker = chosen_broker(None)

    assert broker is not None
    assert (broker.host, broker.port, broker.prefix) == ("broker", 8883, "lab")
    assert (broker.user, broker.password) == ("ann", "s#cret")
    assert "s#cret" not in repr(broker)


@pytest.mark.parametrize(
    "url",
    [
        "http://broker",
        "mqtts://",
        "mqtts://broker:port",
        "mqtt://ann:secret@broker",
        "mqtts://ann:secret@broker/a?retain=1",
        "mqtts://ann:secret@broker/a%23",
        "mqtts://ann:/secret@broker",
        "mqtts://ann:1/secret@broker",
        "mqtts://ann:1?secret=2@broker",
        "mqtts://broker?secret=1",
        "mqtts://ann:1#secret@broker",
    ],
)
def test_a_bad_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError) as error:
        parse_broker(url)

    assert "secret" not in str(error.value)
