"""Three hosts, their network, and the playbook: made, described, and removed."""

import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fleet.broker import Broker
from tests.fleet.host import Host
from tests.fleet.network import Network
from tests.fleet.playbook import Play, Playbook
from tests.fleet.tree import CACHE, base_tree

NAMES = ("ann", "bob", "cid")
# The demo model weighs 10 MB: no host can hold it alone, and any two can.
MEMORY = "10MB"
UNICLUSTER = "sudo -u unicluster UNICLUSTER_HOME=/var/lib/unicluster /opt/unicluster/bin/unicluster"


class Fleet:
    """A context manager. The hosts run, with ssh and nothing of unicluster, when it is entered."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.hosts: dict[str, Host] = {}
        self.wheel = wheel
        self.variables: dict[str, Any] = {}
        self.options: dict[str, list[str]] = {name: ["--memory", MEMORY] for name in NAMES}
        self.models: list[dict[str, Any]] = []
        self._folder = folder
        self._disks = folder / "hosts"
        self._network = Network()
        self._began = time.monotonic()

    def __enter__(self) -> "Fleet":
        tree = base_tree()
        self.say("controller", f"the hosts' tree is {tree}")
        key = self._folder / "id_ed25519"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=60
        )
        # In memory: three trees on disk would be most of what the tests wait for.
        self._disks.mkdir()
        tmpfs = ("mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", str(self._disks))
        subprocess.run(tmpfs, check=True, timeout=60)
        self._network.__enter__()
        try:
            for name in NAMES:
                self.hosts[name] = Host(name, self._network, self._disks, key)
            with ThreadPoolExecutor() as pool:
                list(pool.map(Host.boot, self.hosts.values()))
        except BaseException:
            self.__exit__()
            raise
        for host in self.hosts.values():
            self.say(host.name, f"booted, at {host.address}")
        self.broker = Broker(self.hosts["ann"], self._network, self._folder)
        self._playbook = Playbook(list(self.hosts.values()), self._network, self._folder)
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts.values():
            host.remove()
        self._network.__exit__()
        subprocess.run(["umount", "--lazy", str(self._disks)], check=True, timeout=60)
        self.say("controller", "all hosts are removed")

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def say(self, host: str, what: str) -> None:
        """A line of the story that `make test-fleet` tells."""
        print(f"{time.monotonic() - self._began:7.1f} s  {host:10}  {what}", flush=True)

    def play(self, *arguments: str, book: str = "site.yml") -> Play:
        """Runs the playbook and prints what it changed on which host."""
        variables = {
            "package_wheel": str(self.wheel),
            "package_offline": True,
            "package_wheelhouse": str(CACHE / "wheelhouse"),
            **self.variables,
        }
        of_hosts = {
            name: {"agent_options": self.options[name], "coordinator_models": self.models}
            for name in NAMES
        }
        coordinators = ["ann"] if self.models else []
        play = self._playbook.run(
            variables, *arguments, host_variables=of_hosts, coordinators=coordinators, book=book
        )
        words = " ".join(("ansible-playbook", book, *arguments))
        for name, count in play.changed.items():
            self.say(name, f"{words}: {count} changes")
        return play

    def unicluster(self, host: str, *arguments: str, deadline: float = 120) -> str:
        """Output of a `unicluster` command, run on a host as the service's user."""
        command = f"{UNICLUSTER} {' '.join(arguments)}"
        printed = self[host].run(f"COLUMNS=200 {command}", deadline)
        self.say(host, f"unicluster {' '.join(arguments)}")
        return printed

    def each(self, names: Sequence[str] = NAMES) -> list[Host]:
        return [self.hosts[name] for name in names]
