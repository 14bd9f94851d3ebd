"""What the two sides of a stage agree on: the engine's two verbs, and a head's book with it."""

from collections import deque
from typing import Any, Protocol

from unicluster.v1.stage_pb2 import Frame


class Session:
    """What one head has on this stage: its caches, and results kept until claimed."""

    def __init__(self, stage: int, last: bool) -> None:
        self.stage = stage
        self.last = last
        self.caches: dict[int, Any] = {}
        self.held: dict[int, Any] = {}
        # By cache: the kind of what it was last stepped with, and the next step if it is such.
        self.kinds: dict[int, Any] = {}
        self.foreseen: dict[int, Any] = {}
        self.due: deque[int] = deque()  # caches of which a step may be foreseen

    def forget_steps(self, cache: int) -> None:
        """The next step over a cache can't be foreseen any more."""
        self.kinds.pop(cache, None)
        self.foreseen.pop(cache, None)

    def clear(self) -> None:
        """Lets go of everything."""
        for kept in (self.caches, self.held, self.kinds, self.foreseen, self.due):
            kept.clear()


class StageEngine(Protocol):
    """Computes a stage's layers. All calls come from one thread.

    `computed_tokens` of prompts and answers went through them until now.
    """

    computed_tokens: int

    def serve(self, session: Session, frame: Frame, arrived: float) -> None:
        """Does this stage's part of a frame, which becomes the frame for the next hop.

        `arrived` is the time (perf_counter seconds) at which the frame reached the machine.
        Raises whatever a forward or a cache raises; the session is then of no more use.
        """

    def look_ahead(self, session: Session) -> None:
        """Prepares what is likely to come: called when a frame has left."""

    def end(self, session: Session) -> None:
        """Frees all that the session has."""
