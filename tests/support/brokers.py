"""Real MQTT brokers on this machine, and an ear at them."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from tests.support.cluster import HOST, ROOT, until
from unicluster.cluster.trust import Cluster

USER, PASSWORD = "fleet", "not a secret: #1"
CONFIGURATION = ROOT / "deploy" / "mosquitto" / "unicluster.conf"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """As deploy/ configures it, but for its folders and its port."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "certs").mkdir(parents=True)
        (folder / "data").mkdir()
        identity = cluster.issue("broker")
        for name in ("ca", "cert", "key"):
            (folder / "certs" / f"{name}.pem").write_text(getattr(identity, f"{name}_pem"))
        passwords = folder / "unicluster.passwd"
        subprocess.run(
            ["mosquitto_passwd", "-c", "-b", passwords, USER, PASSWORD], check=True, timeout=30
        )
        text = CONFIGURATION.read_text().replace("/etc/mosquitto", str(folder))
        kept = f"persistence true\npersistence_location {folder}/data/\n"
        self._file = folder / "mosquitto.conf"
        self._file.write_text(f"user root\n{kept}{text}".replace("8883", str(self.port)))

    @property
    def url(self) -> str:
        """For --mqtt."""
        return f"mqtts://{USER}:not%20a%20secret%3A%20%231@{HOST}:{self.port}/lab?ca=cluster"

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
    """What a subscriber has heard, by topic."""

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
def listening(port: int, cluster: Cluster, user: str, password: str) -> Iterator[Ear]:
    """Hears all topics of the broker at that port, whose certificate is of the cluster."""
    ear = Ear()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    context = ssl.create_default_context(cadata=cluster.ca_pem)
    context.check_hostname = False
    client.tls_set_context(context)
    client.username_pw_set(user, password)
    client.on_message = ear.hear
    client.on_connect = lambda client, *rest: client.subscribe("#", qos=1)
    client.connect(HOST, port)
    client.loop_start()
    try:
        yield ear
    finally:
        client.disconnect()
        client.loop_stop()
