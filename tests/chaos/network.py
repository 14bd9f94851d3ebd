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
RESET = "meta l4proto tcp reject with tcp reset"
# Without netem a queue of this rate stands for a slow link.
SLOW_RATE = "2mbit"

# Begins at a host, and returns what ends it.
Trouble = Callable[[str, random.Random], Callable[[], None]]


class Lan:
    """One switch with a port for each host; hosts have addresses of a private net."""

    def __init__(self, net: Networks, hosts: tuple[str, ...]) -> None:
        self._net = net
        self._addresses = {name: f"10.84.0.{at}" for at, name in enumerate((DOOR, *hosts), start=1)}
        net.switch(SWITCH)
        for name, address in self._addresses.items():
            net.plug(name, PORT, SWITCH, f"{address}/24")
            net.ip(name, "route", "add", "default", "dev", PORT)  # for multicast
        self._has_nft = bool(shutil.which("nft")) and self._can(
            "nft", _table("try", "input", RESET)
        )
        self._has_netem = self._can(*_queue("netem", "delay", "1ms"))
        if self._has_nft:
            self._quietly(DOOR, "nft", "delete", "table", "inet", "chaos_try")
        if self._has_netem:
            self._quietly(DOOR, "tc", "qdisc", "del", "dev", PORT, "root")

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

    # Kinds of trouble

    def kinds(self) -> dict[str, Trouble]:
        """By name, as far as this machine has the means."""
        kinds: dict[str, Trouble] = {"blackhole": self.blackhole, "slow link": self.slow}
        if self._has_nft:
            kinds |= {"deaf": self.deaf, "mute": self.mute, "connections reset": self.resetting}
        if self._has_nft or self._has_netem:
            kinds["lossy link"] = self.lossy
        return kinds

    def lacks(self) -> list[str]:
        """Troubles that this machine has no means for, a line each."""
        lacks = []
        if not self._has_netem:
            lacks.append("delays by netem, which the kernel lacks: a slow queue takes its place")
        if not self._has_nft:
            lacks.append("one-way partitions and resets, which need nftables")
        return lacks

    def blackhole(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Nothing goes in or out."""
        self._net.pull(host, PORT)
        return lambda: self._net.mend(host, PORT, SWITCH)

    def deaf(self, host: str, dice: random.Random) -> Callable[[], None]:
        """It can send, and hears nothing."""
        return self._filtered(host, "deaf", "input", f"iifname {PORT} drop")

    def mute(self, host: str, dice: random.Random) -> Callable[[], None]:
        """It hears, and nothing that it sends arrives."""
        return self._filtered(host, "mute", "output", f"oifname {PORT} drop")

    def resetting(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Connections from one other host are reset."""
        other = dice.choice([each for name, each in self._addresses.items() if name != host])
        return self._filtered(host, "reset", "input", f"ip saddr {other} {RESET}")

    def lossy(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Some packets that it sends are lost; with netem, some come twice or too early."""
        percent = dice.randint(*LOSS)
        if self._has_netem:
            loss = ("loss", f"{percent}%", "duplicate", "2%", "delay", "3ms", "reorder", "75%")
            return self._queued(host, *_queue("netem", *loss))
        rule = f"oifname {PORT} numgen random mod 100 < {percent} drop"
        return self._filtered(host, "lossy", "output", rule)

    def slow(self, host: str, dice: random.Random) -> Callable[[], None]:
        """Delays all that it sends: by netem, or behind a queue where the kernel has no netem."""
        delay = dice.randint(*DELAY_MS)
        if self._has_netem:
            return self._queued(host, *_queue("netem", "delay", f"{delay}ms", f"{delay // 4}ms"))
        queue = ("tbf", "rate", SLOW_RATE, "burst", "16kbit", "latency", "300ms")
        return self._queued(host, *_queue(*queue))

    def _queued(self, host: str, *command: str) -> Callable[[], None]:
        self._quietly(host, *command)  # one that is there stays
        return lambda: self._quietly(host, "tc", "qdisc", "del", "dev", PORT, "root")

    def _filtered(self, host: str, name: str, hook: str, rule: str) -> Callable[[], None]:
        self._net.run(host, "nft", _table(name, hook, rule))
        return lambda: self._quietly(host, "nft", "delete", "table", "inet", f"chaos_{name}")

    def _can(self, *command: str) -> bool:
        try:
            self._net.run(DOOR, *command)
        except subprocess.CalledProcessError:
            return False
        return True

    def _quietly(self, host: str, *command: str) -> None:
        """Runs what may fail: to end a trouble, which another one of its kind may have ended."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._net.run(host, *command)


def _table(name: str, hook: str, rule: str) -> str:
    chain = f"chain c {{ type filter hook {hook} priority 0; {rule}; }};"
    return f"table inet chaos_{name} {{ {chain} }}"


def _queue(*discipline: str) -> tuple[str, ...]:
    return ("tc", "qdisc", "add", "dev", PORT, "root", *discipline)


@contextlib.contextmanager
def lan(*hosts: str) -> Iterator[Lan | None]:
    """The network; None where this machine lets nobody make namespaces."""
    if why_not():
        yield None
        return
    with Networks(DOOR, *hosts) as net:
        yield Lan(net, hosts)
