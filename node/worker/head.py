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
from node.metering.clocks import follow
from node.pipeline.pipeline_model import Front, PipelineModel
from node.ring.compute_thread import MLXThread
from node.ring.ring import Ring
from node.worker.chat_service import ChatService
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
    """Opens the ring when the coordinator asks for it, and hands the engine its model."""

    def __init__(
        self,
        front: Front,
        info: StageInfo,
        engine: GenerationEngine,
        thread: MLXThread,
        identity: Credentials,
        *,
        prebuilt: bool = True,
        deadlines: WorkDeadlines | None = None,
    ) -> None:
        """prebuilt: decode steps are built before their input is there. deadlines: of frames."""
        self.model: PipelineModel | None = None
        self._front = front
        self._info = info
        self._engine = engine
        self._thread = thread
        self._identity = identity
        self._prebuilt = prebuilt
        self._deadlines = deadlines or WorkDeadlines()
        self._one_ring = asyncio.Lock()
        self._broken: asyncio.Future[UniclusterError] | None = None

    def fail(self, error: UniclusterError) -> None:
        """Ends the ring and all answers with `error`."""
        self._engine.fail(error)
        self._break(error)

    def _break(self, error: UniclusterError) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(error)

    async def HoldRing(self, request: HoldRingRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        log.info("ring of %d stages for %s", len(request.route) + 1, peer_name(context))
        async with self._one_ring:
            loop = asyncio.get_running_loop()
            broken = self._broken = loop.create_future()
            # A failure of the head's own layers ends the ring too: it is opened again.
            self._engine.on_failure = lambda e: _later(loop, partial(self._break, e))
            ring: Ring | None = None
            following: asyncio.Task[None] | None = None
            try:
                stages = [self._info]
                if request.route:
                    # At once, so that a step that waits for the ring fails with the reason.
                    deadlines = _planned(request) or self._deadlines
                    ring = await Ring.open(
                        list(request.route), self._identity, self.fail, deadlines
                    )
                    stages.extend(ring.stages.stages)
                self.model = PipelineModel(
                    self._front, ring, self._info.node, prebuilt=self._prebuilt
                )
                if ring is not None:
                    clocks = follow(self.model.trips.clocks, ring.route, self._identity)
                    following = asyncio.create_task(clocks)
                await self._engine.set_model(self.model)
                await context.write(Opened(stages=stages))
                await abort(context, await broken)
            except UniclusterError as error:
                await abort(context, error)
            finally:
                self.model = None
                self._engine.fail(UnavailableError("the model is being unloaded"))
                if following is not None:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                if ring is not None:
                    await ring.close()

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
            )
            meters = zip([head, *trips.stages], trips.machines, strict=True)
            measured.meters.stages.extend(meter.to_wire(machine) for meter, machine in meters)
            if trips.stages:
                measured.meters.hops.extend(hop.to_wire() for hop in trips.hops)
        return measured
