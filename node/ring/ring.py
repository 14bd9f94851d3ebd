"""The head's end of the ring: sends frames to the first stage, gets them back from the last."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from node.ring.compute_thread import Signal
from node.ring.stuck import find_stuck
from unicluster import failpoints
from unicluster.cluster.channels import KEEPALIVE_TIME, KEEPALIVE_TIMEOUT, as_error, known_at
from unicluster.cluster.sizes import RESULT_BYTES
from unicluster.deadlines import (
    DECODE,
    OTHER,
    PREFILL,
    Work,
    WorkDeadlines,
    floor_seconds,
    open_seconds,
)
from unicluster.dialing.dialer import Dialer
from unicluster.errors import StageError, UnavailableError, UniclusterError, in_one_line
from unicluster.stall import Stall, look_seconds
from unicluster.trust.identity import Credentials
from unicluster.v1.stage_pb2 import (
    Cancel,
    ClockRequest,
    Fault,
    Frame,
    HopMessage,
    Open,
    Opened,
    RouteStop,
)
from unicluster.v1.stage_pb2_grpc import StageStub

log = logging.getLogger(__name__)

Hop = grpc.aio.StreamStreamCall[HopMessage, HopMessage]

# A machine whose work is stuck finds out by itself a little sooner, and knows more about it.
PATIENCE_FLOORS = 0.5


async def ask_clock(channel: grpc.aio.Channel) -> None:
    """A call by which a stage sees who holds a ring over it; see `lasting`."""
    await StageStub(channel).Clock(ClockRequest())


class Reply:
    """The return of one frame."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._result: Frame | UniclusterError | None = None
        self._left = Signal()
        self._there = Signal()

    def leave(self) -> None:
        """The frame is on its way."""
        self._left.set()

    def put(self, result: Frame | UniclusterError) -> None:
        self._result = result
        self._left.set()
        self._there.set()

    @property
    def is_back(self) -> bool:
        """Whether `wait` returns at once."""
        return self._result is not None

    @property
    def slowest_s(self) -> float | None:
        """Seconds of the machine that computed longest; None until the frame is back."""
        if not isinstance(self._result, Frame):
            return None
        return max((report.compute_s for report in self._result.reports), default=0.0)

    def wait_until_sent(self) -> None:
        """Returns when the frame has left, or never will."""
        self._left.wait()

    def wait(self) -> Frame:
        """The frame as the last stage sent it; raises the error that broke the ring."""
        if self._result is None:
            self._there.wait()
        if isinstance(self._result, UniclusterError):
            raise self._result
        assert self._result is not None  # noqa: S101  # `put` gives it before it sets the signal
        return self._result


class Window:
    """Places for frames on their way, so that a slow machine pushes back.

    `waited`: seconds by `clock` that there was no place.
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.waited = 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[Signal] = deque()

    def enter(self) -> None:
        """Takes a place, the longest waiting first."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            signal = Signal()
            self._waiting.append(signal)
        begun = self._clock()
        signal.wait()
        self.waited += self._clock() - begun

    def leave(self) -> None:
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            signal = self._waiting.popleft()
        signal.set()


class PrefillWindow(Window):
    """Places for chunks of prompts, computed here or on their way, of which one is not on its way.

    So of as many chunks as there are stages none lies at another stage behind one that is being
    computed, where it would be in the way of other answers' steps.
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(places, clock)
        self._away = Window(max(places - 1, 1), clock)

    def depart(self) -> None:
        """Waits until a chunk that was computed here may leave."""
        begun = self._clock()
        self._away.enter()
        self.waited += self._clock() - begun

    def leave(self) -> None:
        self._away.leave()
        super().leave()

    def give_up(self) -> None:
        """Frees the place of a chunk that did not depart."""
        super().leave()


@dataclass
class _Sent:
    reply: Reply
    work: Work
    at: float
    window: Window | None
    on_reply: Callable[[Frame], None] | None
    after: Callable[[Frame], None] | None


class Ring:
    """An open ring. `send` may be called from any thread; all else runs on the event loop.

    It breaks by itself when no frame comes back for longer than `deadlines` have learned.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        route: list[RouteStop],
        deadlines: WorkDeadlines | None = None,
    ) -> None:
        self.route = route
        self.stages: Opened = Opened()
        self.failure: UniclusterError | None = None
        self._loop = loop
        self._ids = itertools.count(1)
        self._sent: dict[int, _Sent] = {}
        self._deadlines = deadlines or WorkDeadlines()
        self._returns = 0
        self._last_return = 0.0
        self._outgoing: asyncio.Queue[HopMessage] = asyncio.Queue()
        self._lock = threading.Lock()
        self._channels = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._on_failure: Callable[[UniclusterError], None] | None = None

    @classmethod
    async def open(
        cls,
        route: list[RouteStop],
        identity: Credentials,
        on_failure: Callable[[UniclusterError], None] | None = None,
        deadlines: WorkDeadlines | None = None,
    ) -> "Ring":
        """Connects through all stages of `route`; raises UnavailableError naming the machine.

        `on_failure` is called on the event loop, once, when an open ring breaks. `deadlines`: of
        frames, from their sending to their return.
        """
        ring = cls(asyncio.get_running_loop(), route, deadlines)
        try:
            await ring._connect(identity)
        except BaseException:
            await ring.close()
            raise
        ring._on_failure = on_failure
        return ring

    def send(
        self,
        message: HopMessage,
        *,
        window: Window | None = None,
        on_reply: Callable[[Frame], None] | None = None,
        after: Callable[[Frame], None] | None = None,
    ) -> Reply:
        """Numbers the frame of `message` and sends it; frames leave in the order of these calls.

        `window`: the caller entered it, and the frame leaves it on its return. `on_reply` is
        called on the event loop before the reply can be waited for, `after` when nobody waits any
        more. A broken ring shows in the reply.
        """
        with self._lock:
            number = message.frame.id = next(self._ids)
            reply = Reply(number)
            if self.failure is None:
                now, work = time.perf_counter(), work_of(message.frame)
                self._sent[number] = _Sent(reply, work, now, window, on_reply, after)
                self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)
                return reply
        reply.put(self.failure)
        if window is not None:
            window.leave()
        return reply

    @property
    def cancels(self) -> bool:
        """Whether all stages understand `cancel`."""
        return all(stage.cancels for stage in self.stages.stages)

    def cancel(self, numbers: Iterable[int]) -> None:
        """Tells all stages not to begin these frames; they come back nevertheless. Any thread."""
        message = HopMessage(cancel=Cancel(frames=numbers))
        with self._lock:
            if self.failure is None and self.cancels:
                self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Runs `action` on the event loop; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, action)

    async def close(self) -> None:
        """Ends the streams; stages then free everything this head had on them."""
        self._fail(UnavailableError("the ring was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.aclose()

    async def _connect(self, identity: Credentials) -> None:
        session = uuid.uuid4().hex
        forward, first = await self._dial(self.route[0], identity)
        self.stages = await open_hop(
            forward, first, Open(session=session, stage=1, route=self.route[1:])
        )
        back, last = await self._dial(self.route[-1], identity)
        opening = Open(session=session, stage=len(self.route), returns=True)
        await open_hop(back, last, opening)
        self._tasks = [
            asyncio.create_task(self._write(forward)),
            asyncio.create_task(self._watch(forward, first)),
            asyncio.create_task(self._read(back, last)),
            asyncio.create_task(self._watch_work(identity)),
        ]

    async def _dial(self, stop: RouteStop, identity: Credentials) -> tuple[Hop, RouteStop]:
        channel, at = await Dialer(identity).connect_stop(stop, RESULT_BYTES)
        await self._channels.enter_async_context(channel)
        await self._channels.enter_async_context(known_at(at.address, identity, ask_clock))
        return StageStub(channel).Hop(), at  # type: ignore[call-arg]  # aio: write and read

    async def _write(self, hop: Hop) -> None:
        while True:
            message = await self._outgoing.get()
            try:
                await failpoints.reach_async("head.send")
                self._note_handed(message.frame)
                await hop.write(message)
                await failpoints.reach_async("head.sent")
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the watching task learns why, and says so
            except Exception as error:
                self._fail(_odd(self.route[0], "can't be sent a frame", error))
                return
            self._left(message.frame.id)

    def _note_handed(self, frame: Frame) -> None:
        """Not in `_write`, for the same reason as `_left`."""
        with self._lock:
            sent = self._sent.get(frame.id)
        if sent is not None:
            frame.handed_s = time.perf_counter() - sent.at

    def _left(self, number: int) -> None:
        """Not in `_write`, which would keep alive what was sent last until it sends again."""
        with self._lock:
            sent = self._sent.get(number)
        if sent is not None:
            sent.reply.leave()

    async def _watch(self, hop: Hop, stop: RouteStop) -> None:
        """The forward hop sends nothing back but the reason for its end."""
        self._fail(await _until_fault(hop, stop, self._unexpected))

    async def _read(self, hop: Hop, stop: RouteStop) -> None:
        error = await _until_fault(hop, stop, self._returned)
        if isinstance(error, HopEndedError):
            # The last stage lost the one before it: the forward hop tells which machine broke.
            watching = self._tasks[1]
            await asyncio.wait([watching], timeout=KEEPALIVE_TIME + KEEPALIVE_TIMEOUT)
        self._fail(error)

    async def _watch_work(self, identity: Credentials) -> None:
        """Breaks the ring when frames are on their way and none has come back for too long."""
        stall = Stall()
        while True:
            await asyncio.sleep(look_seconds())
            with self._lock:
                waiting = [sent.work for sent in self._sent.values()]
            stuck_s = stall.look(self._returns if waiting else None)
            if not waiting:
                continue
            slowest = max(waiting, key=self._deadlines.limit)
            patience = PATIENCE_FLOORS * floor_seconds()
            if stuck_s > self._deadlines.limit(slowest) + patience:
                stages = zip(self.route, self.stages.stages, strict=True)
                try:
                    failure = await find_stuck(list(stages), identity, stuck_s, slowest)
                except Exception as error:
                    failure = _odd(self.route[0], f"{slowest} gets no answer, and it", error)
                self._fail(failure)
                return

    def _unexpected(self, frame: Frame) -> None:
        raise StageError(f"frame {frame.id} came back on the forward hop")

    def _returned(self, frame: Frame) -> None:
        with self._lock:
            sent = self._sent.pop(frame.id, None)
        if sent is None:
            raise StageError(f"frame {frame.id} came back, but was not waited for")
        now = time.perf_counter()
        work = OTHER if frame.skipped else sent.work
        self._deadlines.note(work, now - max(sent.at, self._last_return))
        self._returns, self._last_return = self._returns + 1, now
        if sent.on_reply is not None:
            try:
                sent.on_reply(frame)
            except Exception as error:  # it is no longer among those that `_fail` ends
                failure = _odd(self.route[-1], "sent an invalid frame", error)
                sent.reply.put(failure)
                if sent.window is not None:
                    sent.window.leave()
                raise failure from error
        sent.reply.put(frame)
        if sent.window is not None:
            sent.window.leave()
        if sent.after is not None:
            sent.after(frame)

    def _fail(self, error: UniclusterError) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
            unanswered = list(self._sent.values())
            self._sent.clear()
        for sent in unanswered:
            sent.reply.put(error)
            if sent.window is not None:
                sent.window.leave()
        if self._on_failure is not None:
            self._on_failure(error)


class HopEndedError(UnavailableError):
    """A machine ended a stream without giving a reason."""


async def _until_fault(
    hop: Hop, stop: RouteStop, on_frame: Callable[[Frame], None]
) -> UniclusterError:
    """Passes frames to `on_frame` until the hop breaks; returns the error."""
    try:
        while True:
            message = await read_hop(hop, stop)
            await failpoints.reach_async("head.returned")
            on_frame(message.frame)
    except UniclusterError as error:
        return error
    except Exception as error:
        return _odd(stop, "sent an invalid frame", error)


def _odd(stop: RouteStop, did: str, error: Exception) -> StageError:
    """The error for what no machine of this version does."""
    log.error("machine %s %s", stop.node, did, exc_info=error)
    kind = type(error).__name__
    return StageError(f"machine {stop.node} ({stop.address}) {did}: {kind}: {in_one_line(error)}")


def work_of(frame: Frame) -> Work:
    """The work of a stage with a frame."""
    if not frame.hidden:
        return OTHER
    shape = max((leaf.tensor.shape for leaf in frame.hidden), key=len)
    return Work(PREFILL, max(shape[0] * shape[1], 1)) if frame.hold and len(shape) > 1 else DECODE


async def open_hop(hop: Hop, stop: RouteStop, opening: Open) -> Opened:
    """Sends the first message of a hop and waits until everything behind it is connected.

    Raises UnavailableError naming the machine when that takes longer than it should.
    """
    seconds = open_seconds(1 + len(opening.route))
    try:
        async with asyncio.timeout(seconds):
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await hop.write(HopMessage(open=opening))  # if it fails, reading tells why
            message = await read_hop(hop, stop)
    except TimeoutError:
        raise UnavailableError(
            f"machine {stop.node} ({stop.address}) did not open the ring within {seconds:.0f} s"
        ) from None
    opened = message.opened
    if opened.stages:
        opened.stages[0].address = stop.address
    return opened


async def read_hop(hop: Hop, stop: RouteStop) -> HopMessage:
    """The next message of a hop; raises StageError or UnavailableError naming the machine."""
    try:
        message = await hop.read()
    except grpc.aio.AioRpcError as error:
        who = f"machine {stop.node} ({stop.address})"
        reason = as_error(error, who)
        if type(reason) is UniclusterError:  # of no kind: nobody there foresaw it
            reason = StageError(f"{who} failed: {reason}")
        raise reason from error
    if not isinstance(message, HopMessage):
        raise HopEndedError(f"machine {stop.node} ({stop.address}) ended the stream")
    if message.HasField("fault"):
        raise fault_error(message.fault)
    return message


def fault_error(fault: Fault) -> UniclusterError:
    """The error that a Fault stands for."""
    return (StageError if fault.compute else UnavailableError)(fault.reason)


def fault_message(error: UniclusterError) -> HopMessage:
    """The message that carries `error` towards the head."""
    return HopMessage(fault=Fault(reason=str(error), compute=isinstance(error, StageError)))
