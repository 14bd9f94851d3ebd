"""Faults of a cluster: a method for each kind, at a time that chance chooses."""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram
from unicluster import failpoints

# Steps after which a worker with a failpoint ends: it must get somewhere first.
STEPS = (150, 2500)
POINTS = ("stage.compute", "head.compute", "stage.open", "worker.load")


class Faults:
    """Faults for a running cluster, whose machines come back after each.

    frozen: seconds after which a process that computes nothing counts as lost.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        serve: Callable[[], ServeProgram],
        memory: int,
        frozen: float,
        dice: random.Random,
    ) -> None:
        self.struck: Counter[str] = Counter()
        self.gave_up: list[str] = []  # last words of `serve`
        self.server = serve()
        self._cluster = cluster
        self._serve = serve
        self._memory = memory
        self._frozen = frozen
        self._dice = dice
        self._returns: set[asyncio.Task[None]] = set()
        self._absent: set[str] = set()
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self.worker_killed),
            (10, self.worker_sleeps),
            (6, self.worker_frozen),
            (8, self.agent_killed),
            (6, self.machine_killed),
            (5, self.agent_sleeps),
            (8, self.failpoint),
            (5, self.coordinator_killed),
        ]
        self._taking = {self.agent_killed, self.machine_killed, self.failpoint}

    async def strike(self) -> None:
        """One fault. What it took away comes back by itself, later; only one machine is away."""
        kinds = [each for each in self._kinds if not (self._absent and each[1] in self._taking)]
        ((_, kind),) = self._dice.choices(kinds, [weight for weight, _ in kinds])
        await kind()
        self.struck[kind.__name__.replace("_", " ")] += 1

    async def healed(self) -> None:
        """Returns once all that faults took away is back."""
        while self._returns:
            await asyncio.gather(*self._returns)

    async def supervise(self) -> None:
        """Starts `serve` again where it gave up, as its unit does."""
        while True:
            await asyncio.sleep(0.5)
            if not self.server.running:
                self.gave_up.append(self.server.err.strip().splitlines()[-1])
                self.server = self._serve()

    # Kinds of faults

    async def worker_killed(self) -> None:
        self._send(self._worker(), signal.SIGKILL)

    async def worker_sleeps(self) -> None:
        """For less than what counts as lost."""
        self._asleep(self._worker(), self._dice.uniform(0.05, 0.5) * self._frozen)

    async def worker_frozen(self) -> None:
        """For more than what counts as lost."""
        self._asleep(self._worker(), self._dice.uniform(1.5, 3) * self._frozen)

    async def agent_killed(self) -> None:
        """Its workers end by themselves: nobody is left who holds them."""
        agent = self._agent()
        self._absent.add(agent.name)
        agent.kill()
        self._later(self._back(agent.name))

    async def machine_killed(self) -> None:
        """Agent and workers at once."""
        agent = self._agent()
        workers = agent.workers
        self._absent.add(agent.name)
        agent.kill()
        for worker in workers:
            self._send(worker, signal.SIGKILL)
        self._later(self._back(agent.name))

    async def agent_sleeps(self) -> None:
        self._asleep(psutil.Process(self._agent().pid), self._dice.uniform(0.1, 1.5) * self._frozen)

    async def failpoint(self) -> None:
        """A machine is replaced by one whose workers end at a step, once in each of their lives."""
        agent = self._agent()
        self._absent.add(agent.name)
        agent.end()
        point = self._dice.choice(POINTS)
        nth = 2 if point in ("stage.open", "worker.load") else self._dice.randint(*STEPS)
        action = self._dice.choice(["panic", f"delay({self._dice.randint(50, 1500)})"])
        await self._back(agent.name, **{failpoints.VARIABLE: f"{point}={action}@{nth}"})

    async def coordinator_killed(self) -> None:
        """And started again at once, as its unit would."""
        self.server.kill()
        self.server = self._serve()

    # How

    def _agent(self) -> AgentProgram:
        """Any machine that is there."""
        there = [a for name, a in self._cluster.agents.items() if name not in self._absent]
        return self._dice.choice(there)

    def _worker(self) -> psutil.Process | None:
        workers = sorted(self._cluster.workers(), key=lambda process: process.pid)
        return self._dice.choice(workers) if workers else None

    def _send(self, process: psutil.Process | None, number: signal.Signals) -> None:
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _asleep(self, process: psutil.Process | None, seconds: float) -> None:
        self._send(process, signal.SIGSTOP)
        self._later(self._wake(process, seconds))

    async def _wake(self, process: psutil.Process | None, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._send(process, signal.SIGCONT)

    async def _back(self, name: str, **env: str) -> None:
        await asyncio.sleep(self._dice.uniform(0, 3))
        self._cluster.start_agent(name, memory=self._memory, **env)
        self._absent.discard(name)

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)
