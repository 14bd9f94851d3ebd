"""A stage's worker from its first start to its last end, whoever follows it meanwhile."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from node.supervision.restarts import Restarts
from node.worker.config import WorkerConfig
from node.worker.process import REASON_CHARS, WorkerProcess
from unicluster.causes import Cause, of_error
from unicluster.cluster.background import going_on
from unicluster.errors import shortened
from unicluster.stage_key import stage_key
from unicluster.v1.node_pb2 import (
    Adopted,
    LoadProgress,
    StageEvent,
    StageExit,
    StageReady,
    StageSpec,
)

log = logging.getLogger(__name__)


class RunningStage:
    """One worker, started again when it crashes; at most one coordinator follows its events.

    spec: as its last coordinator gave it. start: starts a worker of a configuration. renew: hands
    it certificates for as long as it runs. on_end: called once, when no worker is left.
    tokens: called with computed tokens.
    """

    def __init__(
        self,
        config: WorkerConfig,
        start: Callable[[WorkerConfig], Awaitable[WorkerProcess]],
        renew: Callable[[WorkerProcess], Awaitable[None]],
        tokens: Callable[[int], None],
        on_end: Callable[["RunningStage"], None],
    ) -> None:
        self._config = config
        self._start = start
        self._renew = renew
        self._tokens = tokens
        self._on_end = on_end
        self._progress: LoadProgress | None = None
        self._ready: StageReady | None = None
        self._follower: Follower | None = None
        self._grace: asyncio.TimerHandle | None = None
        self.worker: WorkerProcess | None = None
        self._task = asyncio.create_task(self._run())

    @property
    def spec(self) -> StageSpec:
        return self._config.spec

    @property
    def port(self) -> int:
        """The port that its workers are to take; 0: any free one."""
        return self._config.port

    @property
    def is_orphaned(self) -> bool:
        """Whether its coordinator has gone, and no other has adopted it."""
        return self._follower is None

    @property
    def is_loading(self) -> bool:
        """Whether its worker starts, fetches or loads."""
        return self._ready is None

    @property
    def loaded_bytes(self) -> int:
        """Bytes of its weights in memory."""
        if self._ready is not None:
            return self._ready.weight_bytes
        return self._progress.bytes_done if self._progress is not None else 0

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self.worker.pid if self.worker is not None else None

    def is_left_for(self, spec: StageSpec) -> bool:
        """Whether nobody holds it any more once `spec` is to run here.

        A coordinator lets go of a service's deployment before it begins the next. Where it still
        seems to hold this one, its end of that stream is gone, and the news has not come yet.
        """
        mine = self.spec
        by_same = bool(spec.service and spec.coordinator) and (
            (mine.service, mine.coordinator) == (spec.service, spec.coordinator)
        )
        return self.is_orphaned or (by_same and mine.deployment != spec.deployment)

    def can_be(self, spec: StageSpec) -> bool:
        """Whether it may be adopted as a stage of that spec, without anything of its old sources.

        While it fetches it needs them, and the coordinator that has gone may be one.
        """
        loads = self._ready is not None or bool(self._progress and self._progress.bytes_total)
        return self.is_left_for(spec) and loads and stage_key(spec) == stage_key(self.spec)

    def follow(self, config: WorkerConfig | None = None) -> "Follower":
        """The events from now on, for a coordinator, which must `leave` in the end.

        config: what it goes on with, when it is adopted: its first event says so, and what is
        known of it follows. Whoever followed before gets no more.
        """
        if self._follower is not None:
            self._follower.end()
        follower = self._follower = Follower()
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        if config is not None:
            self._config = config
            follower.put(StageEvent(adopted=Adopted()))
            if self._ready is not None:
                follower.put(StageEvent(ready=self._ready))
            elif self._progress is not None:
                follower.put(StageEvent(progress=self._progress))
        if self._task.done():
            follower.end()
        return follower

    async def leave(self, follower: "Follower") -> None:
        """The coordinator has gone: the stage has its grace, or ends where it has none."""
        if self._follower is not follower:
            return
        self._follower = None
        spec, seconds = self.spec, self.spec.orphan_grace_s
        if self._task.done():
            return
        if not seconds:
            await asyncio.shield(self.stop())
            return
        log.warning(
            "layers %d-%d: their coordinator has gone; another one can take them for %.0f s",
            *(spec.first_layer, spec.end_layer - 1, seconds),
        )
        self._grace = asyncio.get_running_loop().call_later(seconds, self._grace_ended)

    async def stop(self) -> None:
        """Ends the worker, and returns when it is gone."""
        if self._grace is not None:
            self._grace.cancel()
        self._cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _cancel(self) -> None:
        """Once: a worker that is being ended must be waited for."""
        if not self._task.cancelling():
            self._task.cancel()

    def _grace_ended(self) -> None:
        self._grace = None
        log.warning(
            "layers %d-%d: no coordinator took them: they are unloaded",
            *(self.spec.first_layer, self.spec.end_layer - 1),
        )
        self._cancel()

    def _publish(self, event: StageEvent) -> None:
        if event.HasField("progress"):
            self._progress = event.progress
        elif event.HasField("ready"):
            self._ready = event.ready
        elif event.HasField("exit"):
            self._progress = self._ready = None
        if self._follower is not None:
            self._follower.put(event)

    async def _run(self) -> None:
        try:
            await self._supervise()
        except Exception as error:  # whoever follows must not wait for ever
            log.exception("layers %d-%d", self.spec.first_layer, self.spec.end_layer - 1)
            reason = f"{type(error).__name__}: {error}"
            exit_ = StageExit(
                reason=shortened(reason, REASON_CHARS), cause=of_error(error) or Cause.FAILED
            )
            self._publish(StageEvent(exit=exit_))
        finally:
            self._on_end(self)
            if self._follower is not None:
                self._follower.end()

    async def _supervise(self) -> None:
        restarts = Restarts()
        while True:
            ready, began = False, time.monotonic()
            worker = self.worker = await self._start(self._config)
            renewing = asyncio.ensure_future(self._renew(worker))
            try:
                async for event in worker.events():
                    ready = ready or event["event"] == "ready"
                    if event["event"] == "tokens":
                        self._tokens(event["more"])
                    if (shown := _stage_event(event)) is not None:
                        self._publish(shown)
                ended = await worker.exit()
            finally:
                renewing.cancel()
                # Whoever ends the stage may do so in the middle: the worker must not stay.
                await asyncio.shield(worker.stop())
                self.worker = None
            pause = restarts.after(began, time.monotonic(), ready=ready)
            log.warning(
                "worker for layers %d-%d: %s%s",
                self.spec.first_layer,
                self.spec.end_layer - 1,
                ended.reason,
                "" if pause is None else f"; starting it again in {pause:.2g} s",
            )
            self._publish(
                StageEvent(
                    exit=StageExit(
                        reason=shortened(ended.reason, REASON_CHARS),
                        stderr_tail=ended.stderr_tail,
                        out_of_memory=ended.out_of_memory,
                        cause=ended.cause,
                        restarting=pause is not None,
                    )
                )
            )
            if pause is None:
                return
            await asyncio.sleep(pause)


class Follower:
    """Events on their way to a coordinator. Of progress that waits only the newest is of use."""

    def __init__(self) -> None:
        self._waiting: deque[StageEvent | None] = deque()
        self._stirred = asyncio.Event()

    def put(self, event: StageEvent) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.HasField("progress") and event.HasField("progress"):
            self._waiting.pop()
        self._waiting.append(event)
        self._stirred.set()

    def end(self) -> None:
        self._waiting.append(None)
        self._stirred.set()

    async def events(self) -> AsyncGenerator[StageEvent]:
        while True:
            while not self._waiting:
                self._stirred.clear()
                await self._stirred.wait()
            event = self._waiting.popleft()
            if event is None:
                return
            yield event


async def keep_renewed(
    worker: WorkerProcess, renewals: Callable[[], Any], pause_seconds: float
) -> None:
    """Hands a worker new certificates before its old ones expire."""
    while True:
        with going_on("renewing a worker's certificate"):
            async for identity in renewals():
                worker.renew(identity.to_dict())
        await asyncio.sleep(pause_seconds)


def _stage_event(event: dict[str, Any]) -> StageEvent | None:
    """A worker's event as the coordinator gets it, if it is for the coordinator."""
    if event["event"] == "progress":
        return StageEvent(
            progress=LoadProgress(
                layers_done=event["layers"],
                layers_total=event["layers_total"],
                bytes_done=event["bytes"],
                bytes_total=event["bytes_total"],
            )
        )
    if event["event"] == "fetching":
        return StageEvent(
            progress=LoadProgress(fetched=event["fetched"], to_fetch=event["to_fetch"])
        )
    if event["event"] == "ready":
        return StageEvent(ready=StageReady(port=event["port"], weight_bytes=event["weight_bytes"]))
    return None
