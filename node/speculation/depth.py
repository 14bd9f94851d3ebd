"""How many frames one answer keeps in the pipe, and how many tokens are in each."""

from dataclasses import dataclass

# Frames of one answer on their way, at most: far more than a pipe has stages.
MOST_FRAMES = 16
# Weight of the newest value in a running mean.
RECENT_WEIGHT = 1 / 16
# Guesses are never quite sure.
SUREST = 0.98
# A frame of several tokens has to be this much better: what it is chosen by is measured.
WORTH = 1.05


@dataclass(frozen=True)
class PipeTimes:
    """Seconds that one token of one answer takes: at each stage, the head first, and all hops.

    growth: what each further token in a frame adds to a stage's seconds, as a part of them: next to
    nothing where reading weights takes the time, nearly 1 where each token reads experts of its
    own. None: not known.
    """

    stages: tuple[float, ...]
    hops: float = 0.0
    growth: float | None = None

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

    def width(self, rate: float, frames: int, most: int) -> int:
        """Tokens a frame, at most `most`, by which most tokens are decoded in a second.

        rate: of right guesses. frames: those that may be in flight.
        """
        if self.growth is None or not self.trip:
            return 1
        speeds = [self.speed(rate, frames, width) for width in range(1, most + 1)]
        best = max(speeds)
        return 1 if best < speeds[0] * WORTH else speeds.index(best) + 1

    def speed(self, rate: float, frames: int, width: int) -> float:
        """Tokens a second of one answer, guessed for at a rate of right guesses.

        A run of right guesses, the model's own token after it included, has 1/(1-rate) tokens, in
        1/(1-rate**width) frames: the first takes a whole trip, and each of the others as long as
        the slowest stage, where so many frames are in flight that it never waits.
        """
        rate = min(rate, SUREST)
        more = 1 + (self.growth or 0.0) * (width - 1)
        trip, slowest = sum(self.stages) * more + self.hops, self.slowest * more
        each = max(slowest, trip / frames)
        further = 1 / (1 - rate**width) - 1
        return 1 / (1 - rate) / (trip + further * each)
