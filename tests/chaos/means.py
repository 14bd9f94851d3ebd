"""Means of faults: what is done to processes, networks and disks, and taken back later."""

import asyncio
import contextlib
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.chaos.machines import Machines
from tests.chaos.network import DOOR, Lan
from tests.chaos.points import FETCHING, OFTEN, SERVING, Points
from tests.support.cluster import Program
from tests.support.mounts import fill

# Seconds that a heavy trouble of the network, or of a disk, lasts, and a light one, which is not
# to be noticed.
LONG, SHORT = (1.0, 8.0), (0.2, 1.2)
# Seconds after which a failpoint that nobody reached is disarmed.
ARMED = (4.0, 12.0)
# More of them until a machine without a copy of the model gets a stage.
FETCHES = 30.0
LOOK_SECONDS = 0.3


class Means:
    """Means of a cluster to do harm.

    lan: None for no faults of the network. disk: a small one, of all machines and of `serve`; None
    for none.
    """

    def __init__(
        self, machines: Machines, points: Points, lan: Lan | None, disk: Path | None
    ) -> None:
        self._machines = machines
        self._points = points
        self._lan = lan
        self._disk = disk
        self._returns: set[asyncio.Task[None]] = set()
        self._troubled: set[str] = set()

    async def healed(self) -> None:
        """Returns once all that faults took away is back."""
        while self._returns:
            await asyncio.gather(*self._returns)

    def _network(self, dice: random.Random, lasts: tuple[float, float], words: str) -> str:
        if self._lan is None:
            raise RuntimeError("there is no network to trouble")
        kinds = self._lan.kinds()
        kind = dice.choice(sorted(kinds))
        host = dice.choice([*(agent.name for agent in self._machines.there()), DOOR])
        if lasts is LONG:
            self._troubled.add(host)
        end = kinds[kind](host, dice)

        def heal() -> None:
            end()
            if lasts is LONG:
                self._troubled.discard(host)

        self._later(dice.uniform(*lasts), heal)
        return f"{kind} {words}"

    def _where(self, point: str, dice: random.Random) -> str:
        """The name of a process that may reach a place."""
        if point in SERVING:
            return DOOR
        head, *stages = self._machines.stages or ("",)
        names = [agent.name for agent in self._machines.working()]
        if point in OFTEN:
            wanted = [head] if point.startswith("head.") else stages
            names = [name for name in names if name in wanted] or names
        return dice.choice(names)

    def _disarm_later(self, name: str, point: str, dice: random.Random) -> None:
        seconds = dice.uniform(*ARMED) + (FETCHES if point in FETCHING else 0)
        words = f" failpoint {point}: "
        before = self._machines.logged(name, words)

        async def acted() -> None:
            """Else a process that is started again would end again and again."""
            for _ in range(round(seconds / LOOK_SECONDS)):
                await asyncio.sleep(LOOK_SECONDS)
                if self._machines.logged(name, words) > before:
                    break
            self._points.disarm(name, point)

        self._keep(asyncio.create_task(acted()))

    async def _fill(self, seconds: float) -> None:
        if self._disk is None:
            raise RuntimeError("there is no disk to fill")
        filler = await asyncio.to_thread(fill, self._disk)
        self._later(seconds, lambda: filler.unlink(missing_ok=True))

    def _worker(self, dice: random.Random) -> psutil.Process | None:
        workers = self._machines.workers()
        return dice.choice(workers) if workers else None

    def _send(self, process: psutil.Process | None, number: signal.Signals) -> None:
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _asleep(self, process: psutil.Process | None, seconds: float) -> None:
        self._send(process, signal.SIGSTOP)
        self._later(seconds, lambda: self._send(process, signal.SIGCONT))

    def _later(self, seconds: float, end: Callable[[], None]) -> None:
        async def ends() -> None:
            await asyncio.sleep(seconds)
            end()

        self._keep(asyncio.create_task(ends()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)


def process_of(program: Program) -> psutil.Process | None:
    try:
        return psutil.Process(program.pid)
    except psutil.NoSuchProcess:
        return None


def unlimited(worker: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        worker.rlimit(psutil.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
