"""Mosquitto on one of the hosts, set up by hand as docs/mqtt.md says."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.fleet.host import Host
from tests.fleet.network import Network
from tests.support.brokers import (
    CONFIGURATION,
    COORDINATOR,
    LISTENER,
    PASSWORD,
    PREFIX,
    access_list,
)
from tests.support.cluster import ROOT
from unicluster.trust.cluster import Cluster

PORT = 8883


class Broker:
    """Its certificate is one of the cluster's."""

    def __init__(self, host: Host, network: Network, folder: Path) -> None:
        self._host = host
        self._network = network
        self._ca = folder / "broker-ca.pem"

    def url(self, user: str) -> str:
        """For --mqtt."""
        password = quote(PASSWORD, safe="")
        return f"mqtts://{user}:{password}@{self._host.address}:{PORT}/{PREFIX}?ca=cluster"

    def install(self, cluster: Cluster, machines: Sequence[str]) -> None:
        """Returns when it runs, with a user for each machine."""
        identity = cluster.issue("broker")
        self._ca.write_text(identity.ca_pem)
        files = {
            "certs/ca.pem": identity.ca_pem,
            "certs/cert.pem": identity.cert_pem,
            "certs/key.pem": identity.key_pem,
            "conf.d/unicluster.conf": CONFIGURATION.read_text(),
            "unicluster.acl": access_list(),
        }
        for name, text in files.items():
            self._host.run(f"echo {shlex.quote(text)} | sudo tee /etc/mosquitto/{name} >/dev/null")
        passwords = "/etc/mosquitto/unicluster.passwd"
        users = " ".join([*machines, COORDINATOR, LISTENER])
        self._host.run(
            f"sudo touch {passwords} && for user in {users}; do"
            f" sudo mosquitto_passwd -b {passwords} $user {shlex.quote(PASSWORD)} || exit 1; done"
            f" && sudo chown mosquitto: {passwords} /etc/mosquitto/certs/key.pem"
            f" && sudo chmod 600 {passwords} /etc/mosquitto/certs/key.pem"
            f" && sudo firewall-cmd -q --permanent --add-port={PORT}/tcp"
            f" && sudo firewall-cmd -q --reload && sudo systemctl enable --now mosquitto"
        )

    def hear(self, topics: Mapping[str, str]) -> dict[str, Any]:
        """Waits until all `topics`, below the prefix, had the given values ("": any), and returns
        what they had. AssertionError if that does not happen.
        """
        wanted = [f"{PREFIX}/{topic}={value}" for topic, value in topics.items()]
        ear = (sys.executable, "-m", "tests.fleet.ear", self._host.address, str(PORT))
        command = self._network.inside(*ear, str(self._ca), LISTENER, PASSWORD, *wanted)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return {
            topic.removeprefix(f"{PREFIX}/"): json.loads(text) if text.startswith("{") else text
            for topic, text in json.loads(done.stdout).items()
        }
