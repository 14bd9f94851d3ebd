"""How to guess in a pipe, learned from the times of the tokens: whether, how deep, how wide."""

from collections.abc import Callable

from node.metering.meters import Recent
from node.speculation.depth import RECENT_WEIGHT, PipeTimes
from node.speculation.gate import PipedTimes

# Steps after which all follows what was measured.
MEASURED_STEPS = 16
# To learn what further tokens in a frame cost, while that is not known: now and then a frame of so
# many, where guesses are mostly right.
TRIED_WIDTH = 3
TRIED_STEPS = 8
TRIED_RATE = 0.6


class Pace:
    """Depth and width of one decoder's guesses.

    `pipe_times` gives the times of the pipe, by the head's seconds for a frame of one token.
    """

    def __init__(
        self, pipe_times: Callable[[float], PipeTimes], times: PipedTimes | None = None
    ) -> None:
        self.times = times or PipedTimes()
        self.latest_width = 1
        self.tokens = 0  # of answers that had the pipe to themselves, and their seconds
        self._seconds = 0.0
        self._pipe_times = pipe_times
        self._pipe = pipe_times(0.0)
        self._head_s = 0.0
        self._steps = 0
        self._chosen_at: float | None = None  # when the last token was, if nobody else computed

    @property
    def depth(self) -> int:
        """Frames that keep the slowest stage busy."""
        return self._pipe.depth()

    def width(self, rate: float, frames: int, most: int) -> int:
        """Tokens of the next frame, where so many frames may be in flight."""
        self.latest_width = self._width(rate, frames, most)
        return self.latest_width

    def _width(self, rate: float, frames: int, most: int) -> int:
        if self._pipe.growth is None and self._pipe.trip:
            tries = rate >= TRIED_RATE and self._steps % TRIED_STEPS == 0
            return min(TRIED_WIDTH, most) if tries else 1
        return self._pipe.width(rate, frames, most)

    def begin(self) -> None:
        """Another answer's tokens come next."""
        self._chosen_at = None

    def token(self, now: float, tokens: int, kind: Recent | None, *, alone: bool) -> None:
        """So many tokens were chosen at a time by perf_counter: each a sample of `kind`.

        alone: nobody else has a part of the pipe.
        """
        before, self._chosen_at = self._chosen_at, now if alone else None
        if before is None or not alone:
            return
        self.tokens += tokens
        self._seconds += now - before
        if kind is not None:
            kind.note((now - before) / tokens)

    @property
    def plain_s(self) -> float:
        """Seconds of a lone answer's token without guesses; 0 until known."""
        return self.times.plain.median or self.times.expected[0]

    @property
    def guessing_s(self) -> float:
        """Seconds of its token on average, whether guesses were sent or not; 0 until known."""
        return self._seconds / self.tokens if self.tokens else 0.0

    def step(self, head_s: float, frames: int) -> None:
        """A step has sent so many frames, of one token each, in so many seconds of the head."""
        if frames:
            each = head_s / frames
            self._head_s += RECENT_WEIGHT * (each - self._head_s) if self._head_s else each
        self._steps += 1
        if self._steps % MEASURED_STEPS == 0:
            self._pipe = self._pipe_times(self._head_s)
            self.times.expected = self._pipe.trip, self._pipe.slowest
            self.times.weigh()
