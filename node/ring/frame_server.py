"""A stage's walk over a frame, for any engine: operations, forward, results held and claimed."""

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Generic

from node.ring.cache_table import C, CacheEngine, CacheTable
from node.ring.leaves import leaf_bytes
from node.ring.session import H, Session
from unicluster.v1.stage_pb2 import Frame, StagePart, StageReport

if TYPE_CHECKING:
    from node.ring.cache_table import Leaves


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
        """Does this stage's part of a frame; see StageEngine."""
        started = time.perf_counter()
        report = frame.reports.add(
            stage=session.stage,
            arrived_s=arrived,
            queue_s=started - arrived,
            received_bytes=leaf_bytes(frame.hidden),
        )
        freed = False
        for index, part in enumerate(frame.parts):
            if part.stage == session.stage:
                for op in part.ops:
                    session.caches.apply(op, report)
                    freed |= op.HasField("free")
                if part.cache:
                    self._forward(session, part, frame, report)
                del frame.parts[index]
                break
        if session.last:
            for number in frame.dropped:
                if number in session.held:
                    self.drop(session.held.pop(number))
            if frame.claim:
                self.claim(session.held.pop(frame.claim), frame.hidden)
        self.tidy(freed=freed, prefill=frame.hold)
        report.compute_s = time.perf_counter() - started

    def look_ahead(self, session: Session[C, H]) -> None:
        """Prepares the steps that are likely to come: to be called when a frame has left."""
        while session.due:
            number = session.due.popleft()
            if number in session.caches:
                self.prebuild(session.caches[number])

    def end(self, session: Session[C, H]) -> None:
        """Frees all that the session has."""
        for held in session.held.values():
            self.drop(held)
        session.held.clear()
        session.due.clear()
        session.caches.clear()

    @abstractmethod
    def forward(self, cache: C, hidden: "Leaves", *, prefill: bool) -> bool:
        """Replaces `hidden` by what leaves the layers; true if the next step can be prebuilt."""

    @abstractmethod
    def hold(self, cache: C, hidden: "Leaves") -> H:
        """Computes the caches, takes `hidden`, and returns what `claim` needs for the result."""

    @abstractmethod
    def claim(self, held: H, hidden: "Leaves") -> None:
        """Adds a held result to `hidden`."""

    def drop(self, held: H) -> None:
        """Lets go of a held result."""

    def prebuild(self, cache: C) -> None:
        """Prepares the next step over a cache of which `forward` said that it can be."""

    def tidy(self, *, freed: bool, prefill: bool) -> None:
        """Gives memory back at the end of a frame."""

    @abstractmethod
    def trimmable(self, cache: C) -> bool:
        """Whether the last tokens of a cache can be taken off."""

    @abstractmethod
    def size(self, cache: C) -> int:
        """Tokens in a cache; 0 of one that does not count them."""

    def _forward(
        self, session: Session[C, H], part: StagePart, frame: Frame, report: StageReport
    ) -> None:
        cache, shape = session.caches[part.cache], frame.hidden[0].tensor.shape
        self.computed_tokens += shape[0] * shape[1]
        if session.last and frame.hold:
            session.held[frame.id] = self.hold(cache, frame.hidden)
        elif self.forward(cache, frame.hidden, prefill=frame.hold):
            session.due.append(part.cache)
        report.trimmable = self.trimmable(cache)
        report.size = self.size(cache)
