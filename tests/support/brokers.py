"""Real MQTT brokers on this machine, and an ear at them."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import paho.mqtt.client as paho

from tests.support.cluster import HOST, ROOT, until
from unicluster.trust.cluster import Cluster

PASSWORD = "not a secret: #1"  # noqa: S105  # of brokers that live as long as a test
# The users of deploy/'s access list besides the machines: who serves a model, and who reads.
COORDINATOR, LISTENER = "coordinator", "listener"
PREFIX = "lab"
CONFIGURATION = ROOT / "deploy" / "mosquitto" / "unicluster.conf"


def access_list() -> str:
    """The access list of deploy/, for topics below PREFIX."""
    return CONFIGURATION.with_suffix(".acl").read_text().replace(" unicluster/", f" {PREFIX}/")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """As deploy/ configures it, but for its folders and its port."""

    def __init__(self, folder: Path, cluster: Cluster, machines: Sequence[str]) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "certs").mkdir(parents=True)
        (folder / "data").mkdir()
        identity = cluster.issue("broker")
        for name in ("ca", "cert", "key"):
            (folder / "certs" / f"{name}.pem").write_text(getattr(identity, f"{name}_pem"))
        passwords = folder / "unicluster.passwd"
        passwords.touch()
        for user in (*machines, COORDINATOR, LISTENER):
            subprocess.run(
                ["mosquitto_passwd", "-b", passwords, user, PASSWORD], check=True, timeout=30
            )
        (folder / "unicluster.acl").write_text(access_list())
        text = CONFIGURATION.read_text().replace("/etc/mosquitto", str(folder))
        persistence = f"persistence true\npersistence_location {folder}/data/\n"
        self._file = folder / "mosquitto.conf"
        self._file.write_text(f"user root\n{persistence}{text}".replace("8883", str(self.port)))

    def url(self, user: str) -> str:
        """For --mqtt."""
        password = quote(PASSWORD, safe="")
        return f"mqtts://{user}:{password}@{HOST}:{self.port}/{PREFIX}?ca=cluster"

    def start(self) -> None:
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self._process = subprocess.Popen(
            [program, "-c", str(self._file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(lambda: answers(self.port), "mosquitto answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def __enter__(self) -> "Mosquitto":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


class Ear:
    """Messages that a subscriber has received, by topic."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.retained: set[str] = set()
        self.all: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def hear(self, client: Any, data: Any, message: Any) -> None:
        text = message.payload.decode()
        payload = json.loads(text) if text.startswith("{") else text
        with self._lock:
            self.last[message.topic] = payload
            self.all.append((message.topic, payload))
            if message.retain:
                self.retained.add(message.topic)

    def events(self, topic: str) -> list[str]:
        with self._lock:
            return [payload["event"] for where, payload in self.all if where == topic]


@contextlib.contextmanager
def listening(port: int, cluster: Cluster) -> Iterator[Ear]:
    """Hears all topics of the broker at that port."""
    ear = Ear()
    with connected(port, cluster, LISTENER) as client:
        client.on_message = ear.hear
        client.subscribe([("#", 1)])
        yield ear


@contextlib.contextmanager
def connected(port: int, cluster: Cluster, user: str) -> Iterator[paho.Client]:
    """A client of the broker at that port, whose certificate is of the cluster."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    context = ssl.create_default_context(cadata=cluster.ca_pem)
    context.check_hostname = False
    client.tls_set_context(context)
    client.username_pw_set(user, PASSWORD)
    client.connect(HOST, port)
    client.loop_start()
    try:
        until(client.is_connected, f"{user} is connected")
        yield client
    finally:
        client.disconnect()
        client.loop_stop()
