"""Machines of a network of their own: a namespace each, with as many links as a test wants."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Self

import pytest

_numbers = itertools.count()


def why_not() -> str:
    """Why no namespaces can be made here, in a line; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "apt-get install iproute2"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, timeout=30)
    return "root may make no network namespaces here" if tried.returncode else ""


class Networks:
    """A context manager: hosts without addresses, and switches between them.

    Nothing of it is seen by this machine or reaches the outside. Names are of this process, so that
    tests may run beside each other.
    """

    def __init__(self, *hosts: str) -> None:
        self._prefix = f"un{os.getpid()}-{next(_numbers)}"
        self._switches = f"{self._prefix}-lan"
        self._hosts = hosts
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            for name in (self._switches, *(self._of(host) for host in self._hosts)):
                ip("netns", "add", name)
                self._made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        while self._made:
            ip("netns", "del", self._made.pop())

    def inside(self, host: str) -> tuple[str, ...]:
        """A command that runs a command on a host."""
        return ("ip", "netns", "exec", self._of(host))

    def switch(self, name: str) -> None:
        """Adds a switch, to which hosts can be plugged."""
        # Multicast goes to all ports: snooping would need a querier.
        bridge = ("type", "bridge", "mcast_snooping", "0")
        ip("-n", self._switches, "link", "add", name, *bridge)
        ip("-n", self._switches, "link", "set", name, "up")

    def plug(self, host: str, port: str, switch: str, *addresses: str) -> None:
        """Connects a port of a host to a switch, and gives it addresses, each with its prefix.

        An IPv6 address of the link is there at once, without a look for others that have it.
        """
        far = f"{host}-{port}"
        ends = ("type", "veth", "peer", "name", far, "netns", self._switches)
        ip("-n", self._of(host), "link", "add", port, *ends)
        ip("-n", self._switches, "link", "set", far, "master", switch, "up")
        self.run(host, "sysctl", "-qw", f"net.ipv6.conf.{port}.accept_dad=0")
        for address in addresses:
            ip("-n", self._of(host), "addr", "add", address, "dev", port, *_AT_ONCE[":" in address])
        ip("-n", self._of(host), "link", "set", port, "up")

    def pull(self, host: str, port: str) -> None:
        """Lets a cable lose everything, while both its ends still see a carrier."""
        ip("-n", self._switches, "link", "set", f"{host}-{port}", "nomaster")

    def mend(self, host: str, port: str, switch: str) -> None:
        ip("-n", self._switches, "link", "set", f"{host}-{port}", "master", switch)

    def ip(self, host: str, *arguments: str) -> None:
        """Runs `ip` on a host."""
        ip("-n", self._of(host), *arguments)

    def run(self, host: str, *command: str) -> str:
        """Output of a command on a host."""
        words = [*self.inside(host), *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def _of(self, host: str) -> str:
        return f"{self._prefix}-{host}"


_AT_ONCE: dict[bool, tuple[str, ...]] = {False: (), True: ("nodad",)}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)


def networks(*hosts: str) -> Iterator[Networks]:
    """For a fixture: hosts, or a skip with the reason."""
    if reason := why_not():
        pytest.skip(reason)
    with Networks(*hosts) as made:
        yield made
