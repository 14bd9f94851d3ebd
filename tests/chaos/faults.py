"""Faults of a cluster: a method for each kind, at a time that chance chooses."""

import asyncio
import contextlib
import random
import resource
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from tests.chaos.machines import Machines
from tests.chaos.network import DOOR, Lan
from tests.chaos.points import (
    FETCHING,
    KINDS,
    OFTEN,
    PLANNING,
    SERVING,
    STARTING,
    STATE,
    Points,
)
from tests.support.cluster import AgentProgram, Program
from tests.support.mounts import fill

# Seconds that a heavy trouble of the network, or of a disk, lasts, and a light one, which is not
# to be noticed.
LONG, SHORT = (1.0, 8.0), (0.2, 1.2)
# Seconds after which a failpoint that nobody reached is disarmed.
ARMED = (4.0, 12.0)
# More of them until a machine without a copy of the model gets a stage.
FETCHES = 30.0
LOOK_SECONDS = 0.3
AWAY = (0.0, 3.0)
# Bytes of memory that a worker may have beyond those it has.
MORE_MEMORY = 4 << 20
# A machine that was killed comes back with another disk, with this chance.
NEW_DISK_CHANCE = 0.3

Kind = tuple[int, Callable[[random.Random], Awaitable[str]]]


class Faults:
    """Faults for a running cluster, whose machines come back after each.

    Heavy ones take something away that has to be made anew; light ones should cost a moment.
    frozen: seconds after which a process that computes nothing counts as lost. lan: None for no
    faults of the network. disk: a small one, of all machines and of `serve`; None for none.
    """

    def __init__(
        self,
        machines: Machines,
        frozen: float,
        points: Points,
        lan: Lan | None,
        disk: Path | None,
    ) -> None:
        self.struck: Counter[str] = Counter()
        self._machines = machines
        self._frozen = frozen
        self._points = points
        self._lan = lan
        self._disk = disk
        self._returns: set[asyncio.Task[None]] = set()
        self._troubled: set[str] = set()
        self.heavy: list[Kind] = [
            (18, self.worker_killed),
            (4, self.worker_frozen),
            (6, self.agent_killed),
            (6, self.machine_killed),
            (3, self.agent_frozen),
            (26, self.panic),
            (6, self.error),
            (5, self.coordinator_killed),
            (4, self.memory_limit),
        ]
        self.light: list[Kind] = [
            (25, self.worker_sleeps),
            (10, self.agent_sleeps),
            (6, self.coordinator_sleeps),
            (25, self.delay),
        ]
        if lan is not None:
            self.heavy.append((16, self.network))
            self.light.append((30, self.brief_network))
        if disk is not None:
            self.heavy.append((4, self.fetching_on_a_full_disk))
            self.light.append((5, self.disk_full))
        self._taking = {
            self.agent_killed,
            self.machine_killed,
            self.network,
            self.fetching_on_a_full_disk,
        }

    async def strike(self, kinds: Sequence[Kind], dice: random.Random) -> str:
        """One fault of these kinds; its name. What it took away comes back by itself, later.

        Only one machine is away, or troubled for long, at a time.
        """
        away = self._machines.absent or self._troubled
        kinds = [each for each in kinds if not (away and each[1] in self._taking)]
        ((_, kind),) = dice.choices(kinds, [weight for weight, _ in kinds])
        name = await kind(dice)
        self.struck[name] += 1
        return name

    async def healed(self) -> None:
        """Returns once all that faults took away is back."""
        while self._returns:
            await asyncio.gather(*self._returns)

    # Kinds of heavy faults; each returns the name that it is counted by.

    async def worker_killed(self, dice: random.Random) -> str:
        self._send(self._worker(dice), signal.SIGKILL)
        return "worker killed"

    async def worker_frozen(self, dice: random.Random) -> str:
        """For more than what counts as lost."""
        self._asleep(self._worker(dice), dice.uniform(1.5, 3) * self._frozen)
        return "worker frozen"

    async def agent_killed(self, dice: random.Random) -> str:
        """Its workers end by themselves: nobody is left who holds them."""
        agent = dice.choice(self._machines.working())
        self._machines.absent.add(agent.name)
        agent.kill()
        self._later(dice.uniform(*AWAY), lambda: self._machines.start(agent.name))
        return "agent killed"

    async def machine_killed(self, dice: random.Random) -> str:
        """Agent and workers at once."""
        return await self._machine_killed(dice, new_disk=dice.random() < NEW_DISK_CHANCE)

    async def _machine_killed(
        self, dice: random.Random, agent: AgentProgram | None = None, *, new_disk: bool
    ) -> str:
        agent = agent or dice.choice(self._machines.working())
        workers = agent.workers
        self._machines.absent.add(agent.name)
        agent.kill()
        for worker in workers:
            self._send(worker, signal.SIGKILL)
        if new_disk:
            self._machines.lose_files(agent.name)
        self._later(dice.uniform(*AWAY), lambda: self._machines.start(agent.name))
        return "machine killed, its disk lost" if new_disk else "machine killed"

    async def agent_frozen(self, dice: random.Random) -> str:
        agent = dice.choice(self._machines.there())
        self._asleep(_process(agent), dice.uniform(1, 2) * self._frozen)
        return "agent frozen"

    async def panic(self, dice: random.Random) -> str:
        """A process ends at a place of the code, and what leads there begins."""
        point = self._points.turn(dice.choice(KINDS))
        names = self._machines.names if point in FETCHING else [self._where(point, dice)]
        for name in names:
            self._points.panic(name, point)
            self._disarm_later(name, point, dice)
        await self._lead_to(point, dice.choice(names), dice)
        return f"panic at {point}"

    async def error(self, dice: random.Random) -> str:
        """A place of the code raises an error that nobody foresaw."""
        point = self._points.turn((*OFTEN, *STARTING))
        name = self._where(point, dice)
        self._points.error(name, point)
        self._disarm_later(name, point, dice)
        await self._lead_to(point, name, dice)
        return f"error at {point}"

    async def _lead_to(self, point: str, name: str, dice: random.Random) -> None:
        """Makes it likely that a place is reached, on a machine or in `serve`."""
        agent = next((agent for agent in self._machines.there() if agent.name == name), None)
        if point in FETCHING and not self._machines.absent:
            await self._machine_killed(dice, agent, new_disk=True)
        elif point in PLANNING and not self._machines.absent:
            await self.agent_killed(dice)
        elif point.endswith(".adopted"):
            await self.coordinator_killed(dice)
        elif point not in OFTEN:
            workers = agent.workers if agent is not None else self._machines.workers()
            self._send(dice.choice(workers) if workers else None, signal.SIGKILL)

    async def coordinator_killed(self, dice: random.Random) -> str:
        """And started again at once, as its unit would."""
        self._machines.server.kill()
        self._machines.serve()
        return "coordinator killed"

    async def memory_limit(self, dice: random.Random) -> str:
        """A worker that gets no more memory from the system."""
        if (worker := self._worker(dice)) is not None:
            with contextlib.suppress(psutil.Error):
                most = worker.memory_info().vms + MORE_MEMORY
                worker.rlimit(psutil.RLIMIT_AS, (most, resource.RLIM_INFINITY))
                self._later(dice.uniform(*LONG), lambda: _unlimited(worker))
        return "memory limit"

    async def network(self, dice: random.Random) -> str:
        """A machine, or the coordinator's, that others can't reach, or not well, for seconds."""
        return self._network(dice, LONG, "for seconds")

    async def fetching_on_a_full_disk(self, dice: random.Random) -> str:
        """A machine that comes back without its copy of the model finds no room for another."""
        await self._machine_killed(dice, new_disk=True)
        await self._fill(dice.uniform(*LONG))
        return "disk full, and a copy of the model lost"

    # Light ones

    async def worker_sleeps(self, dice: random.Random) -> str:
        """For less than what counts as lost."""
        self._asleep(self._worker(dice), dice.uniform(0.05, 0.4) * self._frozen)
        return "worker sleeps"

    async def agent_sleeps(self, dice: random.Random) -> str:
        agent = dice.choice(self._machines.there())
        self._asleep(_process(agent), dice.uniform(0.05, 0.4) * self._frozen)
        return "agent sleeps"

    async def coordinator_sleeps(self, dice: random.Random) -> str:
        server = self._machines.server
        self._asleep(_process(server), dice.uniform(0.05, 0.4) * self._frozen)
        return "coordinator sleeps"

    async def delay(self, dice: random.Random) -> str:
        """A process waits for a moment at a place of the code."""
        point = self._points.turn((*OFTEN, *STARTING, *STATE))
        name = self._where(point, dice)
        self._points.delay(name, point)
        self._disarm_later(name, point, dice)
        return f"delay at {point}"

    async def brief_network(self, dice: random.Random) -> str:
        return self._network(dice, SHORT, "for a moment")

    async def disk_full(self, dice: random.Random) -> str:
        """Nothing can be written for a while: no caches of prompts, no state."""
        await self._fill(dice.uniform(*LONG))
        return "disk full"

    # How

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


def _process(program: Program) -> psutil.Process | None:
    try:
        return psutil.Process(program.pid)
    except psutil.NoSuchProcess:
        return None


def _unlimited(worker: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        worker.rlimit(psutil.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
