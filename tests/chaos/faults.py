"""Faults of a cluster: a method for each kind, at a time that chance chooses."""

import contextlib
import random
import resource
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from tests.chaos.machines import Machines
from tests.chaos.means import LONG, SHORT, Means, process_of, unlimited
from tests.chaos.network import Lan
from tests.chaos.points import (
    FETCHING,
    KINDS,
    OFTEN,
    PLANNING,
    STARTING,
    STATE,
    Points,
)
from tests.support.cluster import AgentProgram

AWAY = (0.0, 3.0)
# Bytes of memory that a worker may have beyond those it has.
MORE_MEMORY = 4 << 20
# A machine that was killed comes back with another disk, with this chance.
NEW_DISK_CHANCE = 0.3

Kind = tuple[int, Callable[[random.Random], Awaitable[str]]]


class Faults(Means):
    """Faults for a running cluster, whose machines come back after each.

    Heavy ones take something away that has to be made anew; light ones should cost a moment.
    frozen: seconds after which a process that computes nothing counts as lost.
    """

    def __init__(
        self,
        machines: Machines,
        frozen: float,
        points: Points,
        lan: Lan | None,
        disk: Path | None,
    ) -> None:
        super().__init__(machines, points, lan, disk)
        self.struck: Counter[str] = Counter()
        self._frozen = frozen
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
        self._asleep(process_of(agent), dice.uniform(1, 2) * self._frozen)
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
                self._later(dice.uniform(*LONG), lambda: unlimited(worker))
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
        self._asleep(process_of(agent), dice.uniform(0.05, 0.4) * self._frozen)
        return "agent sleeps"

    async def coordinator_sleeps(self, dice: random.Random) -> str:
        server = self._machines.server
        self._asleep(process_of(server), dice.uniform(0.05, 0.4) * self._frozen)
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
