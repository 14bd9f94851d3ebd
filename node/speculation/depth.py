"""How many frames one answer keeps in the pipe, and whether guessing pays."""

from dataclasses import dataclass

# Frames of one answer on their way, at most: far more than a pipe has stages.
MOST_FRAMES = 16
# Weight of the newest value in a running mean.
RECENT_WEIGHT = 1 / 16
# Below this rate of right guesses, only every so many-th token is guessed after.
LEAST_RATE = 0.1
PROBE_TOKENS = 16


@dataclass(frozen=True)
class PipeTimes:
    """Seconds that one token of one answer takes: at each stage, the head first, and all hops."""

    stages: tuple[float, ...]
    hops: float = 0.0

    def depth(self) -> int:
        """Frames that keep the slowest stage busy.

        A frame's whole trip over the slowest stage's part of it, rounded: with one frame more it
        only waits in a queue, and a guess that fails is noticed as late.
        """
        slowest = max(self.stages, default=0.0)
        if not slowest or not all(self.stages):  # not measured yet
            return max(1, min(len(self.stages), MOST_FRAMES))
        whole = sum(self.stages) + self.hops
        return max(1, min(round(whole / slowest), MOST_FRAMES))


class HitRate:
    """Running rate of right guesses, by which an answer guesses, or only tries now and then."""

    def __init__(self) -> None:
        self.rate = 0.5
        self._tokens = 0

    def note(self, *, right: bool) -> None:
        """A guess was verified."""
        self.rate += RECENT_WEIGHT * (right - self.rate)

    def next_token(self) -> None:
        """The model has chosen a token."""
        self._tokens += 1

    @property
    def pays(self) -> bool:
        """Whether to guess now."""
        return self.rate >= LEAST_RATE or self._tokens % PROBE_TOKENS == 0
