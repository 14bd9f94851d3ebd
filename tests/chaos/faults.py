"""Faults of a cluster: a method for each kind, at a time that chance chooses."""

import asyncio
import contextlib
import random
import resource
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from tests.chaos.network import DOOR, Lan
from tests.chaos.points import LOADING, OFTEN, SERVING, Points
from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram
from tests.support.mounts import fill

# Seconds that a trouble of the network, or of a disk, lasts: some are noticed, some are not.
TROUBLE = (0.3, 8.0)
# Seconds after which a failpoint that nobody reached is disarmed.
ARMED = (1.0, 5.0)
# Bytes of memory that a worker may have beyond those it has.
MORE_MEMORY = 4 << 20


class Faults:
    """Faults for a running cluster, whose machines come back after each.

    start: starts an agent. serve: starts `serve`. frozen: seconds after which a process that
    computes nothing counts as lost. lan: None for no faults of the network. disk: a small one
    that holds the prompt caches of all machines; None for none.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        start: Callable[[str], AgentProgram],
        serve: Callable[[], ServeProgram],
        frozen: float,
        dice: random.Random,
        points: Points,
        lan: Lan | None,
        disk: Path | None,
    ) -> None:
        self.struck: Counter[str] = Counter()
        self.gave_up: list[str] = []  # last words of `serve`
        self.server = serve()
        self._cluster = cluster
        self._start = start
        self._serve = serve
        self._frozen = frozen
        self._dice = dice
        self._points = points
        self._lan = lan
        self._disk = disk
        self._returns: set[asyncio.Task[None]] = set()
        self._absent: set[str] = set()
        self._troubled: set[str] = set()
        self._kinds: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (24, self.worker_killed),
            (10, self.worker_sleeps),
            (3, self.worker_frozen),
            (6, self.agent_killed),
            (5, self.machine_killed),
            (5, self.agent_sleeps),
            (22, self.failpoint),
            (4, self.coordinator_killed),
            (4, self.memory_limit),
        ]
        if lan is not None:
            self._kinds.append((18, self.network))
        if disk is not None:
            self._kinds.append((3, self.disk_full))
        self._taking = {self.agent_killed, self.machine_killed, self.network}

    async def strike(self) -> str:
        """One fault; its name. What it took away comes back by itself, later.

        Only one machine is away, or troubled, at a time.
        """
        away = self._absent or self._troubled
        kinds = [each for each in self._kinds if not (away and each[1] in self._taking)]
        ((_, kind),) = self._dice.choices(kinds, [weight for weight, _ in kinds])
        name = await kind()
        self.struck[name] += 1
        return name

    async def healed(self) -> None:
        """Returns once all that faults took away is back."""
        while self._returns:
            await asyncio.gather(*self._returns)

    async def supervise(self) -> None:
        """Starts programs again that ended by themselves, as their units do."""
        while True:
            await asyncio.sleep(0.3)
            if not self.server.running:
                self.gave_up.append(self._last_words())
                self.server = self._serve()
            for name, agent in list(self._cluster.agents.items()):
                if not agent.running and name not in self._absent:
                    self._start(name)

    def _last_words(self) -> str:
        out, err = (text.strip().splitlines() for text in (self.server.out, self.server.err))
        return f"code {self.server.process.returncode}: {' / '.join(out[-1:] + err[-1:])}"

    # Kinds of faults; each returns the name that it is counted by.

    async def worker_killed(self) -> str:
        self._send(self._worker(), signal.SIGKILL)
        return "worker killed"

    async def worker_sleeps(self) -> str:
        """For less than what counts as lost."""
        self._asleep(self._worker(), self._dice.uniform(0.05, 0.5) * self._frozen)
        return "worker sleeps"

    async def worker_frozen(self) -> str:
        """For more than what counts as lost."""
        self._asleep(self._worker(), self._dice.uniform(1.5, 3) * self._frozen)
        return "worker frozen"

    async def agent_killed(self) -> str:
        """Its workers end by themselves: nobody is left who holds them."""
        agent = self._agent()
        self._absent.add(agent.name)
        agent.kill()
        self._later(self._back(agent.name))
        return "agent killed"

    async def machine_killed(self) -> str:
        """Agent and workers at once."""
        agent = self._agent()
        workers = agent.workers
        self._absent.add(agent.name)
        agent.kill()
        for worker in workers:
            self._send(worker, signal.SIGKILL)
        self._later(self._back(agent.name))
        return "machine killed"

    async def agent_sleeps(self) -> str:
        self._asleep(psutil.Process(self._agent().pid), self._dice.uniform(0.1, 1.5) * self._frozen)
        return "agent sleeps"

    async def failpoint(self) -> str:
        """A place of the code is armed, and what leads there begins."""
        kind = self._dice.choice((OFTEN, OFTEN, LOADING, SERVING))
        point = self._dice.choice(kind)
        if kind is SERVING:
            name = DOOR
        else:
            working = [agent for agent in self._there() if agent.workers]
            name = self._dice.choice(working or self._there()).name
        self._points.arm(name, point)
        self._later(self._disarmed(name))
        if kind is not OFTEN:  # it is reached in a recovery
            agent = self._cluster.agents.get(name)
            victims = agent.workers if agent is not None and agent.running else []
            self._send(victims[0] if victims else self._worker(), signal.SIGKILL)
        return f"failpoint {point}"

    async def coordinator_killed(self) -> str:
        """And started again at once, as its unit would."""
        self.server.kill()
        self.server = self._serve()
        return "coordinator killed"

    async def network(self) -> str:
        """A machine, or the coordinator's, that others can't reach, or not well."""
        if self._lan is None:
            raise RuntimeError("there is no network to trouble")
        kinds = self._lan.kinds()
        kind = self._dice.choice(sorted(kinds))
        names = [agent.name for agent in self._there()]
        host = self._dice.choice([*names, DOOR])
        self._troubled.add(host)
        end = kinds[kind](host, self._dice)
        self._later(self._healed(host, end))
        return kind

    async def disk_full(self) -> str:
        """Nothing can be written to it for a while."""
        if self._disk is None:
            raise RuntimeError("there is no disk to fill")
        self._later(self._emptied(fill(self._disk)))
        return "disk full"

    async def memory_limit(self) -> str:
        """A worker that gets no more memory from the system."""
        if (worker := self._worker()) is not None:
            with contextlib.suppress(psutil.Error):
                most = worker.memory_info().vms + MORE_MEMORY
                worker.rlimit(psutil.RLIMIT_AS, (most, resource.RLIM_INFINITY))
                self._later(self._unlimited(worker))
        return "memory limit"

    # How

    def _there(self) -> list[AgentProgram]:
        agents = self._cluster.agents.items()
        return [agent for name, agent in agents if name not in self._absent and agent.running]

    def _agent(self) -> AgentProgram:
        """Any machine that is there."""
        return self._dice.choice(self._there())

    def _worker(self) -> psutil.Process | None:
        workers = [worker for agent in self._there() for worker in agent.workers]
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

    async def _back(self, name: str) -> None:
        await asyncio.sleep(self._dice.uniform(0, 3))
        self._start(name)
        self._absent.discard(name)

    async def _disarmed(self, name: str) -> None:
        await asyncio.sleep(self._dice.uniform(*ARMED))
        self._points.disarm(name)

    async def _healed(self, host: str, end: Callable[[], None]) -> None:
        await asyncio.sleep(self._dice.uniform(*TROUBLE))
        end()
        self._troubled.discard(host)

    async def _emptied(self, filler: Path) -> None:
        await asyncio.sleep(self._dice.uniform(*TROUBLE))
        await asyncio.to_thread(filler.unlink)

    async def _unlimited(self, worker: psutil.Process) -> None:
        await asyncio.sleep(self._dice.uniform(*TROUBLE))
        with contextlib.suppress(psutil.Error):
            worker.rlimit(psutil.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)
