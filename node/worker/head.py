"""The head worker: stage 0, the ring, and the engine that generates answers over them."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from node.generation.engine import GenerationEngine
from node.pipeline.pipeline_model import Front, PipelineModel
from node.ring.compute_thread import MLXThread
from node.worker.chat_service import ChatService
from node.worker.held_ring import HeldRing
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import peer_name
from unicluster.deadlines import DECODE, PREFILL, WorkDeadlines
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.identity import Credentials
from unicluster.v1.chat_pb2 import (
    ChatInfo,
    DescribeChatRequest,
    HoldRingRequest,
    Measured,
    MeasureRequest,
    SavePrefixesReply,
    SavePrefixesRequest,
)
from unicluster.v1.chat_pb2_grpc import HeadServicer
from unicluster.v1.stage_pb2 import Opened, StageInfo

log = logging.getLogger(__name__)

# Seconds that no token takes.
FOR_EVER = 3600.0
# For writing prefixes to disk before the ring is closed.
MOST_SAVING_SECONDS = 60.0

Context = grpc.aio.ServicerContext[Any, Any]


class Head(HeadServicer):
    """Opens the ring when the coordinator asks for it, and hands the engine its model.

    The ring outlives the coordinator for `grace_s` seconds, with the caches of prompts and of
    answers that broke off: the next one takes it over where all its stages are the same.
    """

    def __init__(
        self,
        front: Front,
        info: StageInfo,
        engine: GenerationEngine,
        identity: Credentials,
        *,
        prebuilt: bool = True,
        deadlines: WorkDeadlines | None = None,
        grace_s: float = 0.0,
    ) -> None:
        """prebuilt: decode steps are built before their input is there. deadlines: of frames."""
        self._front = front
        self._info = info
        self._engine = engine
        self._identity = identity
        self._prebuilt = prebuilt
        self._deadlines = deadlines or WorkDeadlines()
        self._grace_s = grace_s
        self._one_ring = asyncio.Lock()
        self._held: HeldRing | None = None
        self._leaving: asyncio.Task[None] | None = None  # closes a ring that nobody holds

    @property
    def model(self) -> PipelineModel | None:
        """The model behind the ring, while that is open."""
        return self._held.model if self._held is not None else None

    @property
    def threads(self) -> int:
        """Threads that compute a token here; 0 where that is the engine's own affair."""
        return self._front.threads

    def fail(self, error: UniclusterError) -> None:
        """Ends the ring and all answers with `error`."""
        self._engine.fail(error)
        self._break(error)

    def _break(self, error: UniclusterError) -> None:
        if self._held is not None:
            self._held.end(error)

    async def HoldRing(self, request: HoldRingRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        log.info("ring of %d stages for %s", len(request.route) + 1, peer_name(context))
        async with self._one_ring:
            try:
                held = await self._taken_over(request) or await self._opened(request)
                try:
                    await context.write(Opened(stages=held.stages))
                    error = await asyncio.shield(held.broken)
                finally:
                    if held.broken.done() or not self._grace_s:
                        await self._close()
                    else:
                        self._leaving = asyncio.create_task(self._close_later(held))
            except UniclusterError as failure:
                error = failure
            await abort(context, error)

    async def _taken_over(self, request: HoldRingRequest) -> HeldRing | None:
        """The ring that a coordinator before has left, where it is the one that is asked for.

        Another one is closed. By then the caches of answers that broke off can be claimed.
        """
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.cancel()
        held = self._held
        if held is not None and held.fits(request.route):
            await self._engine.settle()
            if not held.broken.done():  # still: that took a while
                log.info("the ring that was left is taken over")
                return held
        await self._close()
        return None

    async def _opened(self, request: HoldRingRequest) -> HeldRing:
        loop = asyncio.get_running_loop()
        failed: list[UniclusterError] = []

        def fail(error: UniclusterError) -> None:
            failed.append(error)
            self.fail(error)

        # At once, so that a step that waits for the ring fails with the reason.
        deadlines = _planned(request) or self._deadlines
        held = await HeldRing.open(
            *(self._front, self._info, list(request.route), self._identity, deadlines, fail),
            prebuilt=self._prebuilt,
        )
        self._held = held
        # A failure of the head's own layers ends the ring too: it is opened again.
        self._engine.on_failure = lambda e: _later(loop, partial(self._break, e))
        for error in failed:  # before anybody could be told
            held.end(error)
        try:
            await self._engine.set_model(held.model)
        except BaseException:
            await self._close()
            raise
        return held

    async def _close_later(self, held: HeldRing) -> None:
        """Closes a ring that no coordinator holds once it breaks, or its time is over."""
        await asyncio.wait([held.broken], timeout=self._grace_s)
        async with self._one_ring:
            if held is self._held:
                log.info("the ring is closed: no coordinator took it over")
                await self._close()

    async def _close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._engine.fail(UnavailableError("the model is being unloaded"))
            await held.close()

    async def SavePrefixes(  # noqa: N802
        self, request: SavePrefixesRequest, context: Context
    ) -> SavePrefixesReply:
        seconds = min(max(request.seconds, 0.0), MOST_SAVING_SECONDS)
        try:
            return SavePrefixesReply(saved=await self._engine.save_prefixes(seconds))
        except UniclusterError as error:
            return await abort(context, error)


def _planned(request: HoldRingRequest) -> WorkDeadlines | None:
    """Deadlines of a ring by its plan; None where the request says nothing of that.

    What another ring has taught this head does not hold for a ring of other machines.
    """
    if not (0 < request.decode_s < FOR_EVER and 0 < request.prefill_s < FOR_EVER):
        return None
    return WorkDeadlines({DECODE.kind: request.decode_s, PREFILL: request.prefill_s})


def _later(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(work)


class HeadChat(ChatService):
    """The engine's Chat service, which also counts the caches on the stages."""

    def __init__(self, engine: GenerationEngine, head: Head, thread: MLXThread) -> None:
        super().__init__(engine)
        self._head = head
        self._thread = thread
        self._counting: asyncio.Task[int] | None = None

    async def Describe(  # noqa: N802
        self, request: DescribeChatRequest, context: Context
    ) -> ChatInfo:
        info = await super().Describe(request, context)
        model = self._head.model
        if model is not None:
            began = time.perf_counter()
            try:
                live = await self._live_caches(model)
                if model.stages > 1:  # a frame for each of the others
                    info.ring_s = (time.perf_counter() - began) / (model.stages - 1)
                info.live_caches = max(live - info.kept_caches * (model.stages - 1), 0)
            except UniclusterError as error:
                await abort(context, error)
        return info

    async def _live_caches(self, model: PipelineModel) -> int:
        """Counted once for all who ask meanwhile: the count may outlast whoever began it."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._thread.run(model.live_caches))
        return await asyncio.shield(self._counting)

    async def Measure(  # noqa: N802
        self, request: MeasureRequest, context: Context
    ) -> Measured:
        measured = await super().Measure(request, context)
        if self._head.model is not None:
            trips = self._head.model.trips
            head = replace(
                trips.head,
                busy_s=self._thread.busy_s,
                queue_s=self._thread.queue_s,
                decode=self._engine.meter.step,
                disk_bytes=self._engine.disk_bytes,
                threads=self._head.threads,
            )
            meters = zip([head, *trips.stages], trips.machines, strict=True)
            measured.meters.stages.extend(meter.to_wire(machine) for meter, machine in meters)
            if trips.stages:
                measured.meters.hops.extend(hop.to_wire() for hop in trips.hops)
        return measured
