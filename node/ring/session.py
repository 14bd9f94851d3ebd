"""One head's caches and deferred results on a stage, and the engine behind a stage's service."""

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

from node.prefixes.store import PrefixStore
from node.ring.bounds import MOST_CANCELLED, FrameError
from node.ring.cache_engine import C
from node.ring.cache_table import CacheTable
from unicluster.v1.stage_pb2 import Frame

H = TypeVar("H")  # an engine's result that waits until it is claimed


class CancelledFrames:
    """Numbers of frames that need not be computed; from the event loop to the compute thread.

    Frames come in ascending order, so a number is forgotten with its frame or a later one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: set[int] = set()
        self._served = 0  # the last frame's number

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    def add(self, numbers: Iterable[int]) -> None:
        """Takes numbers in, but of frames that were served. Raises FrameError for too many."""
        with self._lock:
            self._numbers.update(number for number in numbers if number > self._served)
            if len(self._numbers) > MOST_CANCELLED:
                raise FrameError(f"more than {MOST_CANCELLED} frames are cancelled, and none came")

    def served(self, number: int) -> None:
        """Forgets the numbers up to that of a frame."""
        with self._lock:
            self._served = max(self._served, number)
            if self._numbers:
                self._numbers = {each for each in self._numbers if each > self._served}


class Session(Generic[C, H]):
    """The state of one head on this stage.

    stage: its index in the ring, from 0 at the head. last: nothing follows it in the ring.
    deferred: results by the number of their frame, until they are claimed or dropped.
    due: caches whose next decode step may be prebuilt. cancelled: frames not to be computed.
    """

    def __init__(self, stage: int, last: bool, caches: CacheTable[C]) -> None:
        self.stage = stage
        self.last = last
        self.caches = caches
        self.deferred: dict[int, H] = {}
        self.due: deque[int] = deque()
        self.cancelled = CancelledFrames()

    def skips(self, frame: Frame) -> bool:
        """Whether a frame is not to be forwarded: it was cancelled, here or on the way."""
        return bool(frame.skipped) or (frame.id in self.cancelled and not frame.hold)


class StageEngine(Protocol):
    """Computes a stage's layers. All calls but `open` come from one thread.

    `computed_tokens` of prompts and answers went through them until now. `prefixes`: the stage's
    on disk; None where nothing is kept there.
    """

    computed_tokens: int
    prefixes: PrefixStore | None

    def open(self, stage: int, last: bool) -> Session[Any, Any]:
        """A new session, for the stage of that index."""

    def serve(self, session: Session[Any, Any], frame: Frame, arrived: float) -> None:
        """Does this stage's part of a frame, which becomes the frame for the next hop.

        `arrived` is the time (perf_counter seconds) at which the frame reached the machine.
        Raises whatever a forward or a cache raises; the session is then of no more use.
        """

    def look_ahead(self, session: Session[Any, Any]) -> None:
        """Prebuilds the next decode steps: called when a frame has left."""

    def end(self, session: Session[Any, Any]) -> None:
        """Frees all that the session has."""
