"""Serving of frames for any engine: cache operations, forward, deferred results."""

import time
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Generic

from node.ring.bounds import FrameError
from node.ring.cache_engine import C, CacheEngine
from node.ring.cache_table import CacheTable
from node.ring.choices import check_choices, choose_tokens
from node.ring.leaves import check_leaves, leaf_bytes
from node.ring.session import H, Session
from unicluster import failpoints
from unicluster.v1.stage_pb2 import Frame, StagePart, StageReport

if TYPE_CHECKING:
    from node.ring.cache_engine import Leaves


class FrameServer(CacheEngine[C], Generic[C, H]):
    """Serves frames. An engine adds its cache operations and the abstract methods below.

    A frame's hidden states are (batch, tokens, hidden), or token ids (batch, tokens) at the
    head; the engine replaces them in place. All calls but `open` come from one thread.
    """

    computed_tokens = 0  # of prompts and answers

    def open(self, stage: int, last: bool) -> Session[C, H]:
        """A new session, for the stage of that index."""
        return Session(stage, last, CacheTable(self))

    def serve(self, session: Session[C, H], frame: Frame, arrived: float) -> None:
        """Does this stage's part of a frame; see StageEngine.

        Raises FrameError for a frame whose numbers don't fit the session.
        """
        _check(session, frame)
        started = time.perf_counter()
        report = frame.reports.add(
            stage=session.stage,
            arrived_s=arrived,
            queue_s=started - arrived,
            received_bytes=leaf_bytes(frame.hidden),
            handed_s=frame.handed_s,
        )
        if session.stage and not session.skips(frame):  # stage 0 is a part of the head
            failpoints.reach("stage.compute")
        freed = False
        for index, part in enumerate(frame.parts):
            if part.stage == session.stage:
                for op in part.ops:
                    session.caches.apply(op, report)
                    failpoints.reach("cache.applied")
                    freed |= op.HasField("free")
                if part.cache and session.skips(frame):
                    self._skip(session, part, frame, report)
                elif part.cache:
                    with self._working():
                        self._forward(session, part, frame, report)
                del frame.parts[index]
                break
        if session.last:
            for number in frame.dropped:
                if number in session.deferred:
                    self.drop(session.deferred.pop(number))
            if frame.claim:
                with self._working():
                    self._claim(session, frame)
        session.cancelled.served(frame.id)
        self.tidy(freed=freed, prefill=frame.hold)
        if self.prefixes is not None:
            report.disk_bytes = self.prefixes.nbytes
        report.threads = self.threads
        if session.stage:
            failpoints.reach("stage.computed")
        report.compute_s = time.perf_counter() - started

    def look_ahead(self, session: Session[C, H]) -> None:
        """Prebuilds the next decode steps: to be called when a frame has left."""
        while session.due:
            number = session.due.popleft()
            if number in session.caches:
                self.prebuild(session.caches[number])

    def end(self, session: Session[C, H]) -> None:
        """Frees all that the session has."""
        for deferred in session.deferred.values():
            self.drop(deferred)
        session.deferred.clear()
        session.due.clear()
        session.caches.clear()

    def check_positions(self, hidden: "Leaves", tokens: int) -> None:
        """Raises FrameError for positions beside the hidden state that `tokens` don't have."""

    @property
    def threads(self) -> int:
        """Threads that compute a token; 0 where that is the engine's own affair."""
        return 0

    @abstractmethod
    def forward(self, cache: C, hidden: "Leaves", *, prefill: bool) -> bool:
        """Replaces `hidden` by the layers' output; true if the next step can be prebuilt."""

    @abstractmethod
    def hold(self, cache: C, hidden: "Leaves") -> H:
        """Computes the caches, takes `hidden`, and returns the deferred result for `claim`."""

    @abstractmethod
    def claim(self, deferred: H, hidden: "Leaves") -> None:
        """Adds a deferred result to `hidden`."""

    def drop(self, deferred: H) -> None:
        """Frees a deferred result."""

    def prebuild(self, cache: C) -> None:
        """Prebuilds the next step over a cache for which `forward` returned true."""

    def tidy(self, *, freed: bool, prefill: bool) -> None:
        """Gives memory back at the end of a frame."""

    @abstractmethod
    def extent(self, hidden: "Leaves") -> tuple[int, int]:
        """(batch, tokens) of a frame's input. Raises FrameError if the layers can't take it."""

    def _working(self) -> AbstractContextManager[None]:
        """Lets prefixes that can wait do so while an answer is computed."""
        return nullcontext() if self.prefixes is None else self.prefixes.workload.running()

    def _forward(
        self, session: Session[C, H], part: StagePart, frame: Frame, report: StageReport
    ) -> None:
        with session.caches.named(f"forward with cache {part.cache}"):
            if not frame.hidden:
                raise FrameError("the frame has no hidden state")
            rows, tokens = self.extent(frame.hidden)
            cache, length = session.caches.advance(part.cache, rows, tokens)
            self.check_positions(frame.hidden, length)
            if session.last and frame.choices:
                check_choices(frame, rows * tokens)
            self._run_layers(session, part.cache, cache, frame)
        self.computed_tokens += rows * tokens
        report.trimmable = self.trimmable(cache)
        report.size = self.size(cache)

    def _skip(
        self, session: Session[C, H], part: StagePart, frame: Frame, report: StageReport
    ) -> None:
        """Counts the tokens of a cancelled frame as missing in its cache: a trim will follow."""
        with session.caches.named(f"skipped forward with cache {part.cache}"):
            if not frame.skipped:
                _, frame.skipped = self.extent(frame.hidden)
                del frame.hidden[:]
            session.caches.skip(part.cache, frame.skipped)
        report.skipped = True

    def _run_layers(self, session: Session[C, H], number: int, cache: C, frame: Frame) -> None:
        if session.last and frame.hold:
            session.deferred[frame.id] = self.hold(cache, frame.hidden)
        elif self.forward(cache, frame.hidden, prefill=frame.hold):
            session.due.append(number)
        if session.last and frame.choices:
            choose_tokens(frame)

    def _claim(self, session: Session[C, H], frame: Frame) -> None:
        with session.caches.named(f"claim of frame {frame.claim}"):
            if frame.claim not in session.deferred:
                raise FrameError("it is not held")
            self.claim(session.deferred.pop(frame.claim), frame.hidden)


def _check(session: Session[C, H], frame: Frame) -> None:
    """Raises FrameError for stages and frame numbers that can't be."""
    check_leaves(frame.hidden)
    stages = [part.stage for part in frame.parts]
    most = session.stage if session.last else None
    if stages and (min(stages) < session.stage or (most is not None and max(stages) > most)):
        raise FrameError(f"frame {frame.id}: operations for stages {stages}, at {session.stage}")
    if len(set(stages)) != len(stages):
        raise FrameError(f"frame {frame.id}: two parts for one stage, of {stages}")
    if len(frame.reports) > session.stage:
        raise FrameError(f"frame {frame.id}: {len(frame.reports)} reports at {session.stage}")
    if session.last and frame.hold and (not frame.id or frame.id in session.deferred):
        raise FrameError(f"frame {frame.id}: a result of that number can't be held")
    if frame.skipped and (frame.hidden or frame.hold):
        raise FrameError(f"frame {frame.id}: it was skipped, and has a hidden state or is held")
    if session.last and frame.claim and any(part.cache for part in frame.parts):
        raise FrameError(f"frame {frame.id}: it forwards, and claims frame {frame.claim}")
