"""The one thread that touches MLX in a process; it never runs network code.

MLX's streams belong to threads, so there is one thread for all computing. An action that waits
for another machine runs as a fiber: while it waits, other due actions run.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from unicluster.deadlines import OTHER, Work, WorkDeadlines

T = TypeVar("T")


class MLXThread:
    """Runs actions in order; a fiber continues when the result it waits for has arrived.

    `busy_s`: seconds of work so far. `queue_s`: seconds that due actions have waited.
    `deadlines` learns how long each kind of work takes. `failure`: the exception of an action
    that must not raise; nothing runs after it.
    """

    def __init__(self, deadlines: WorkDeadlines | None = None) -> None:
        self.busy_s = 0.0
        self.queue_s = 0.0
        self.deadlines = deadlines or WorkDeadlines()
        self.failure: BaseException | None = None
        self._lap: tuple[float, Work] | None = None
        self._actions: queue.SimpleQueue[tuple[float, Callable[[], object], Work]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name="mlx", daemon=True)
        self._thread.start()

    @property
    def running(self) -> tuple[float, Work] | None:
        """When the work that runs now began (perf_counter seconds), and what it is."""
        return self._lap

    def stack(self) -> str:
        """Where the thread is now in Python's code, innermost call last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def post(self, action: Callable[[], object], work: Work = OTHER) -> None:
        """Queues an action that neither raises nor waits; callable from any thread."""
        self._actions.put((time.perf_counter(), action, work))

    def start(self, action: Callable[[], object], work: Work = OTHER) -> None:
        """Queues an action that does not raise, as a fiber; callable from any thread."""
        self.post(lambda: _Fiber(self, action, work).switch(), work)

    async def run(self, action: Callable[[], T], work: Work = OTHER) -> T:
        """Runs `action` as a fiber; returns its result, or raises its exception."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def attempt() -> None:
            try:
                result = action()
            except BaseException as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self.start(attempt, work)
        return await done

    def begin(self, work: Work) -> None:
        """On this thread: what runs now is done, and `work` begins."""
        self._end_lap()
        self._lap = time.perf_counter(), work

    def relabel(self, work: Work) -> None:
        """On this thread: what runs now is `work`."""
        if self._lap is not None:
            self._lap = self._lap[0], work

    def _work(self) -> None:
        while self.failure is None:
            due, action, work = self._actions.get()
            began = time.perf_counter()
            self.queue_s += began - due
            self._lap = began, work
            try:
                action()
            except BaseException as error:
                self.failure = error
            self._end_lap()
            self.busy_s += time.perf_counter() - began

    def _end_lap(self) -> None:
        if self._lap is not None:
            began, work = self._lap
            self._lap = None
            self.deadlines.note(work, time.perf_counter() - began)


class _Fiber(greenlet):
    """Made by the thread's own loop, to which it returns when it waits and when it ends."""

    def __init__(self, thread: MLXThread, action: Callable[[], object], work: Work) -> None:
        super().__init__(action)
        self.rested_s = 0.0
        self.thread = thread
        self.work = work

    def wake(self) -> None:
        self.thread.post(self.switch, self.work)

    def rest(self) -> None:
        """Returns once `wake` was called and it is this fiber's turn."""
        assert self.parent is not None  # noqa: S101
        began = time.perf_counter()
        self.parent.switch()
        self.rested_s += time.perf_counter() - began


class Signal:
    """Set for good, from any thread. One fiber may wait for it, or any other thread, blocking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for the two below
        self._is_set = False
        self._fiber: _Fiber | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        with self._lock:
            if self._is_set:
                return
            self._is_set = True
        if self._fiber is not None:
            self._fiber.wake()
        self._gate.release()

    def wait(self) -> None:
        fiber = getcurrent()
        if not isinstance(fiber, _Fiber):
            self._gate.acquire()
            self._gate.release()  # for the next time
            return
        with self._lock:
            if self._is_set:
                return
            self._fiber = fiber
        fiber.rest()


def rested() -> float:
    """The seconds in which this fiber has not run, since it was started; 0 outside of fibers."""
    fiber = getcurrent()
    return fiber.rested_s if isinstance(fiber, _Fiber) else 0.0


def begin(work: Work) -> None:
    """In a fiber: `work` begins now, and goes on when the fiber does. Nothing elsewhere."""
    fiber = getcurrent()
    if isinstance(fiber, _Fiber):
        fiber.work = work
        fiber.thread.begin(work)


def give_way() -> None:
    """In a fiber: returns after everything that is due has run."""
    fiber = getcurrent()
    if isinstance(fiber, _Fiber):
        fiber.wake()
        fiber.rest()


def pause(seconds: float) -> None:
    """In a fiber: returns after so many seconds, in which others run."""
    over = Signal()
    timer = threading.Timer(seconds, over.set)
    timer.daemon = True
    timer.start()
    over.wait()


def until_done(future: "Future[Any]", seconds: float) -> None:
    """In a fiber: returns when a future of another thread is done, or after `seconds`."""
    over = Signal()
    timer = threading.Timer(max(seconds, 0.0), over.set)
    timer.daemon = True
    timer.start()
    future.add_done_callback(lambda _: over.set())
    over.wait()
    timer.cancel()
