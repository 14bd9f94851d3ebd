"""A LAN of its own: a bridge in a network namespace, one more namespace for each host."""

import os
import subprocess

SUBNET = "10.83.7"
CONTROLLER = f"{SUBNET}.1"


class Network:
    """A context manager. Nothing of it is seen by this machine or reaches the outside."""

    def __init__(self) -> None:
        self._prefix = f"uc{os.getpid()}"
        self.lan = f"{self._prefix}-lan"
        self._namespaces: list[str] = []
        self._addresses: dict[str, str] = {}

    def __enter__(self) -> "Network":
        self._add_namespace(self.lan)
        # Multicast goes to all ports: snooping would need a querier, which a small LAN has not.
        ip("-n", self.lan, "link", "add", "lan", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.lan, "addr", "add", f"{CONTROLLER}/24", "dev", "lan")
        ip("-n", self.lan, "link", "set", "lan", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for namespace in reversed(self._namespaces):
            ip("netns", "del", namespace)

    def plug(self, host: str) -> str:
        """Connects a host; returns its address."""
        namespace = self.namespace(host)
        address = f"{SUBNET}.{10 + len(self._addresses)}"
        self._add_namespace(namespace)
        ends = ("peer", "name", host, "netns", self.lan)
        ip("-n", namespace, "link", "add", "eth0", "type", "veth", *ends)
        ip("-n", self.lan, "link", "set", host, "master", "lan", "up")
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "route", "add", "default", "via", CONTROLLER)
        self._addresses[host] = address
        return address

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def link(self, host: str, state: str) -> None:
        """`down` pulls the cable, `up` puts it in again."""
        ip("-n", self.lan, "link", "set", host, state)

    def inside(self, *command: str) -> list[str]:
        """The command, as it runs on the LAN: from the controller's place."""
        return ["ip", "netns", "exec", self.lan, *command]

    def _add_namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self._namespaces.append(name)
        ip("-n", name, "link", "set", "lo", "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)
