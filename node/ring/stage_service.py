"""The stage worker's side of the ring: frames in from the hop before, out to the hop after."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import grpc

from node.ring.compute_thread import MLXThread
from node.ring.ring import ask_clock, fault_message, open_hop, read_hop, work_of
from node.ring.session import Session, StageEngine
from node.ring.stuck import name_of
from unicluster import failpoints
from unicluster.causes import Cause, of_error
from unicluster.cluster.channels import known_at
from unicluster.deadlines import OTHER, open_seconds
from unicluster.dialing.dialer import Dialer
from unicluster.errors import StageError, UnavailableError, UniclusterError, in_one_line
from unicluster.trust.identity import Credentials
from unicluster.v1.stage_pb2 import (
    ClockReading,
    ClockRequest,
    HopMessage,
    Open,
    Opened,
    RouteStop,
    StageInfo,
)
from unicluster.v1.stage_pb2_grpc import StageServicer, StageStub

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[HopMessage, HopMessage]


class _LiveSession:
    """A session with its way out and the error that ended it, if one did."""

    def __init__(self, session: Session[Any, Any]) -> None:
        self.session = session
        self.outgoing: asyncio.Queue[HopMessage | None] = asyncio.Queue()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False

    def fail(self, error: UniclusterError) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


class StageService(StageServicer):
    """Serves one loaded stage to any number of heads, each with its own session."""

    def __init__(
        self, stage: StageEngine, info: StageInfo, thread: MLXThread, identity: Credentials
    ) -> None:
        self._stage = stage
        self._info = info
        info.cancels = True
        self._thread = thread
        self._identity = identity
        self._sessions: dict[str, _LiveSession] = {}

    async def Hop(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        try:
            async with asyncio.timeout(open_seconds(0)):
                message = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "open: did not come in time")
        if not isinstance(message, HopMessage) or not message.HasField("open"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "open: must come first")
        opening = message.open
        if not opening.stage:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "stage: 0 is the head")
        if opening.returns:
            await self._return_results(opening, context)
        elif opening.session in self._sessions:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "session: is open already")
        else:
            await self._serve_session(opening, context)

    async def Clock(  # noqa: N802
        self, request: ClockRequest, context: "grpc.aio.ServicerContext[ClockRequest, ClockReading]"
    ) -> ClockReading:
        lap, now = self._thread.running, time.perf_counter()
        if lap is None:
            return ClockReading(now_s=now)
        return ClockReading(now_s=now, running_s=now - lap[0], work=str(lap[1]))

    def fail(self, error: UniclusterError) -> None:
        """Ends every session: each head gets `error`."""
        for live in self._sessions.values():
            live.fail(error)

    async def _return_results(self, opening: Open, context: Context) -> None:
        live = self._sessions.get(opening.session)
        if live is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "session: is not open here")
            return
        await context.write(HopMessage(opened=Opened(stages=[self._info])))
        while (message := await live.outgoing.get()) is not None:
            await failpoints.reach_async("stage.return")
            _note_handed(message)
            await context.write(message)
            await failpoints.reach_async("stage.returned")
            self._look_ahead(live)

    async def _serve_session(self, opening: Open, context: Context) -> None:
        await failpoints.reach_async("stage.open")
        live = _LiveSession(self._stage.open(opening.stage, last=not opening.route))
        self._sessions[opening.session] = live
        tasks: list[asyncio.Task[None]] = []
        try:
            async with contextlib.AsyncExitStack() as stack:
                stages = [self._info]
                if opening.route:
                    hop, stop, behind = await self._connect_next(opening, stack)
                    stages.extend(behind)
                    tasks.append(asyncio.create_task(self._write_frames(live, hop)))
                    tasks.append(asyncio.create_task(_until_fault(hop, stop)))
                await context.write(HopMessage(opened=Opened(stages=stages)))
                tasks.append(asyncio.create_task(self._read_frames(live, context)))
                await asyncio.wait([*tasks, live.failed], return_when=asyncio.FIRST_COMPLETED)
                for ended in (live.failed, *tasks):
                    if ended.done():
                        ended.result()
        except UniclusterError as error:
            log.warning("session ended: %s", error)
            await context.write(fault_message(error))
        except Exception as error:  # else gRPC's own words would say neither where nor what
            log.exception("session")
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            await context.write(
                fault_message(StageError(f"{name_of(self._info.node, self._info)}: {reason}"))
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            live.failed.cancel()
            self._end(opening.session)

    async def _connect_next(
        self, opening: Open, stack: contextlib.AsyncExitStack
    ) -> tuple[Any, RouteStop, list[StageInfo]]:
        rest = opening.route[1:]
        channel, stop = await Dialer(self._identity).connect_stop(opening.route[0])
        await stack.enter_async_context(channel)
        await stack.enter_async_context(known_at(stop.address, self._identity, ask_clock))
        hop = StageStub(channel).Hop()  # type: ignore[call-arg]  # aio: write and read
        opened = await open_hop(
            hop, stop, Open(session=opening.session, stage=opening.stage + 1, route=rest)
        )
        return hop, stop, list(opened.stages)

    async def _read_frames(self, live: _LiveSession, context: Context) -> None:
        loop = asyncio.get_running_loop()
        while isinstance(message := await context.read(), HopMessage):
            arrived = time.perf_counter()
            await failpoints.reach_async("stage.received")
            if message.HasField("cancel"):
                self._cancel(live, message)
                continue
            self._thread.post(
                lambda m=message, a=arrived: self._serve(live, m, a, loop),  # type: ignore[misc]
                work_of(message.frame),
            )

    def _cancel(self, live: _LiveSession, message: HopMessage) -> None:
        """On the event loop: overtakes the frames that wait for the compute thread."""
        try:
            live.session.cancelled.add(message.cancel.frames)
        except UniclusterError as error:
            live.fail(error)
            return
        if not live.session.last:
            live.outgoing.put_nowait(message)

    def _serve(
        self,
        live: _LiveSession,
        message: HopMessage,
        arrived: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """On the MLX thread."""
        if live.closed:
            return
        try:
            if live.session.skips(message.frame):
                self._thread.relabel(OTHER)  # it would pass for a very fast step
            self._stage.serve(live.session, message.frame, arrived)
        except Exception as error:
            log.exception("frame %d", message.frame.id)
            live.closed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fault = StageError(
                f"{name_of(self._info.node, self._info)} failed while computing: {reason}"
            )
            loop.call_soon_threadsafe(live.fail, fault)
            if of_error(error) is Cause.DRIVER_FAULT:
                raise  # the device is of no use to this process any more: it ends
        else:
            loop.call_soon_threadsafe(live.outgoing.put_nowait, message)

    async def _write_frames(self, live: _LiveSession, hop: Any) -> None:
        while (message := await live.outgoing.get()) is not None:
            await failpoints.reach_async("stage.send")
            _note_handed(message)
            try:
                await hop.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await asyncio.Future()  # the reader of this hop learns the reason and ends us
            await failpoints.reach_async("stage.sent")
            self._look_ahead(live)

    def _look_ahead(self, live: _LiveSession) -> None:
        """Prebuilds steps once a frame has left: earlier it would delay the sending."""
        if live.session.due:
            self._thread.post(lambda: self._stage.look_ahead(live.session))

    def _end(self, name: str) -> None:
        live = self._sessions.pop(name)
        live.outgoing.put_nowait(None)

        def release() -> None:
            live.closed = True
            self._stage.end(live.session)

        self._thread.post(release)


def _note_handed(message: HopMessage) -> None:
    """Writes into a frame how long it has waited for the event loop, once computed."""
    if message.HasField("frame") and message.frame.reports:
        report = message.frame.reports[-1]
        computed = report.arrived_s + report.queue_s + report.compute_s
        message.frame.handed_s = time.perf_counter() - computed


async def _until_fault(hop: Any, stop: RouteStop) -> None:
    """A hop sends nothing back but the reason for its end."""
    await read_hop(hop, stop)
    raise UnavailableError(f"machine {stop.node} ({stop.address}) spoke out of turn")
