"""A spare worker: one that has imported its libraries, and takes the place of one that is lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster.cluster.background import going_on

log = logging.getLogger(__name__)

# Without a start of a worker, until a spare one is started: whatever loads now is more urgent.
QUIET_SECONDS = 3.0

Environment = Mapping[str, str]


class SpareWorker:
    """Starts an agent's workers, from a spare one where there is one of the same environment.

    Starting Python and importing MLX takes seconds, in which an answer would wait. A spare takes
    some 70 MB of memory, which are no longer free then, and no time of a core.

    is_busy: whether stages are being loaded now. enabled: whether there is to be a spare.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        *,
        enabled: bool = True,
        prepare: Callable[[Environment], Awaitable[WorkerProcess]] | None = None,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._is_busy = is_busy
        self._enabled = enabled
        self._prepare = prepare or _prepare
        self._quiet_seconds = quiet_seconds
        self._waiting: tuple[dict[str, str], WorkerProcess] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[WorkerProcess] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The spare worker's process id, while there is one."""
        waiting = self._waiting
        return waiting[1].pid if waiting is not None and waiting[1].is_waiting else None

    async def start(self, config: WorkerConfig, environment: Environment) -> WorkerProcess:
        """A worker of that configuration, with those variables in its environment."""
        waiting, self._waiting = self._waiting, None
        self.renew(environment)
        if waiting is not None and waiting[0] == dict(environment) and waiting[1].is_waiting:
            waiting[1].configure(config)
            return waiting[1]
        if waiting is not None:
            await asyncio.shield(waiting[1].stop())
        return await WorkerProcess.start(config, extra=environment)

    def renew(self, environment: Environment) -> None:
        """Starts a spare worker once it is quiet."""
        if not self._enabled or self._closed:
            return
        if self._preparing is not None:
            self._preparing.cancel()
        self._preparing = asyncio.create_task(self._prepare_one(dict(environment)))

    async def close(self) -> None:
        """Ends it, and starts no other."""
        self._closed = True
        if self._preparing is not None:
            self._preparing.cancel()
        begun = [task for task in (self._preparing, self._starting) if task is not None]
        await asyncio.gather(*begun, return_exceptions=True)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await waiting[1].stop()

    async def _prepare_one(self, environment: dict[str, str]) -> None:
        while True:
            await asyncio.sleep(self._quiet_seconds)
            if not self._is_busy():
                break
        if self._waiting is not None:
            return
        with going_on("starting a spare worker"):
            # Not to be cancelled halfway: nobody would know of the process.
            self._starting = asyncio.create_task(self._started(environment))
            worker = await asyncio.shield(self._starting)
            log.debug("spare worker: process %d", worker.pid)

    async def _started(self, environment: dict[str, str]) -> WorkerProcess:
        worker = await self._prepare(environment)
        if self._closed or self._waiting is not None:
            await worker.stop()
        else:
            self._waiting = environment, worker
        return worker


async def _prepare(environment: Environment) -> WorkerProcess:
    return await WorkerProcess.prepare(extra=environment)
