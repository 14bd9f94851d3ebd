"""A network for chaos: a namespace for each machine, and what goes wrong with its packets."""

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator

from tests.support.netns import Networks, why_not

SWITCH, PORT = "lan", "eth0"
# Where `serve` and its clients are.
DOOR = "door"
# Of lost packets, percent. TCP does no better than wait with more of them.
LOSS = (2, 15)
DELAY_MS = (5, 60)
# Without netem a queue of this rate stands for a slow link.
SLOW_RATE = "2mbit"


class Lan:
    """One switch with a port for each host; hosts have addresses of a private net."""

    def __init__(self, net: Networks, hosts: tuple[str, ...]) -> None:
        self._net = net
        self._addresses = {name: f"10.84.0.{at}" for at, name in enumerate((DOOR, *hosts), start=1)}
        net.switch(SWITCH)
        for name, address in self._addresses.items():
            net.plug(name, PORT, SWITCH, f"{address}/24")
            net.ip(name, "route", "add", "default", "dev", PORT)  # for multicast

    def address(self, host: str) -> str:
        return self._addresses[host]

    def prefix(self, host: str) -> tuple[str, ...]:
        """A command that runs a command on a host."""
        return self._net.inside(host)

    def enter_door(self) -> None:
        """Moves this thread, and what it starts from now on, to the door's host."""
        namespace = os.open(f"/run/netns/{self._net.inside(DOOR)[3]}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(namespace)

    # Kinds of trouble: each begins at once, and returns what ends it.

    def kinds(self) -> dict[str, Callable[[str, random.Random], Callable[[], None]]]:
        """By name, as far as this machine has the means."""
        kinds = {"blackhole": self.blackhole, "slow link": self.slow}
        if shutil.which("nft"):
            kinds |= {"deaf": self.deaf, "mute": self.mute, "lossy link": self.lossy}
        return kinds

    def blackhole(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Nothing goes in or out."""
        self._net.pull(host, PORT)
        return lambda: self._net.mend(host, PORT, SWITCH)

    def deaf(self, host: str, dice: random.Random) -> Callable[[], None]:
        """It can send, and hears nothing."""
        return self._filtered(host, "input", f"iifname {PORT} drop")

    def mute(self, host: str, dice: random.Random) -> Callable[[], None]:
        """It hears, and nothing that it sends arrives."""
        return self._filtered(host, "output", f"oifname {PORT} drop")

    def lossy(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Some packets that it sends are lost."""
        percent = dice.randint(*LOSS)
        return self._filtered(
            host, "output", f"oifname {PORT} numgen random mod 100 < {percent} drop"
        )

    def slow(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Delays all that it sends: by netem, or behind a queue where the kernel has no netem."""
        delay = dice.randint(*DELAY_MS)
        netem = ("netem", "delay", f"{delay}ms", f"{delay // 4}ms")
        queue = ("tbf", "rate", SLOW_RATE, "burst", "16kbit", "latency", "300ms")
        for discipline in (netem, queue):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._net.run(host, "tc", "qdisc", "add", "dev", PORT, "root", *discipline)
                break
        return lambda: self._quietly(host, "tc", "qdisc", "del", "dev", PORT, "root")

    def _filtered(self, host: str, hook: str, rule: str) -> Callable[[], None]:
        table = f"chaos_{hook}"
        chain = f"chain c {{ type filter hook {hook} priority 0; {rule}; }};"
        text = f"table inet {table} {{ {chain} }}"
        self._net.run(host, "nft", text)
        return lambda: self._quietly(host, "nft", "delete", "table", "inet", table)

    def _quietly(self, host: str, *command: str) -> None:
        """Ends a trouble, which another one of its kind may have ended."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._net.run(host, *command)


@contextlib.contextmanager
def lan(*hosts: str) -> Iterator[Lan | None]:
    """The network; None where this machine lets nobody make namespaces."""
    if why_not():
        yield None
        return
    with Networks(DOOR, *hosts) as net:
        yield Lan(net, hosts)
