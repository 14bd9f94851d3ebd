"""How many frames one answer keeps in the pipe."""

from dataclasses import dataclass

# Frames of one answer on their way, at most: far more than a pipe has stages.
MOST_FRAMES = 16
# Weight of the newest value in a running mean.
RECENT_WEIGHT = 1 / 16


@dataclass(frozen=True)
class PipeTimes:
    """Seconds that one token of one answer takes: at each stage, the head first, and all hops."""

    stages: tuple[float, ...]
    hops: float = 0.0

    @property
    def trip(self) -> float:
        """Seconds of a token's whole way; 0 where a stage is not measured yet."""
        return sum(self.stages) + self.hops if all(self.stages) else 0.0

    @property
    def slowest(self) -> float:
        """Seconds of the slowest stage."""
        return max(self.stages, default=0.0)

    def depth(self) -> int:
        """Frames that keep the slowest stage busy.

        A frame's whole trip over the slowest stage's part of it, rounded: with one frame more it
        only waits in a queue, and a guess that fails is noticed as late.
        """
        if not self.trip:
            return max(1, min(len(self.stages), MOST_FRAMES))
        return max(1, min(round(self.trip / self.slowest), MOST_FRAMES))
