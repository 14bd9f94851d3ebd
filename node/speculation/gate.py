"""Whether to guess at all: by how often guesses are right, and what right and wrong ones cost."""

from collections.abc import Callable

from node.metering.meters import Recent

# A running mean of this many guesses.
RECENT_GUESSES = 16
# Below this rate guesses never pay.
LEAST_RATE = 0.1
# Guessing begins again at a rate this much above the one at which it ends.
HYSTERESIS = 1.2
# While it doesn't pay, only every so many-th token is guessed after.
PROBE_TOKENS = 64
# Steps of a kind, before their times are believed.
ENOUGH = 8
# A rate that no guesses have.
NEVER = 2.0


class HitRate:
    """Running rate of right guesses: one half, before there are any."""

    def __init__(self) -> None:
        self.rate = 0.5
        self._count = 2

    def note(self, *, right: bool) -> None:
        """A guess was verified, or would have been."""
        self._count = min(self._count + 1, RECENT_GUESSES)
        self.rate += (right - self.rate) / self._count


class Gate:
    """Lets an answer guess while that pays: from a rate of right guesses of `least` on."""

    def __init__(self, least: Callable[[], float]) -> None:
        self._least = least
        self._hits = HitRate()
        self._tokens = 0
        self._open = True

    @property
    def rate(self) -> float:
        """Running rate of right guesses."""
        return self._hits.rate

    @property
    def is_open(self) -> bool:
        """Whether guessing pays now."""
        return self._open

    @property
    def lets_pass(self) -> bool:
        """Whether to guess now: because it pays, or to try whether it would."""
        return self._open or self._tokens % PROBE_TOKENS == 0

    def note(self, *, right: bool) -> None:
        """A guess was verified, or would have been."""
        self._hits.note(right=right)
        least = self._least()
        self._open = self.rate >= (least if self._open else least * HYSTERESIS)

    def next_token(self) -> None:
        """The model has chosen a token."""
        self._tokens += 1


class PipedTimes:
    """Seconds from one token of an answer to the next: plain, after a right guess, after a wrong.

    `expected`: seconds of the first two as the stages' times let expect them; 0 for not known.
    """

    def __init__(self) -> None:
        self.plain, self.right, self.wrong = Recent(), Recent(), Recent()
        self.expected = 0.0, 0.0
        self._least = LEAST_RATE

    @property
    def least_rate(self) -> float:
        """The rate of right guesses at which those that are wrong cost what the others save."""
        return self._least

    def weigh(self) -> None:
        """Has `least_rate` follow what was measured."""
        plain = _median(self.plain, self.expected[0])
        saved = plain - _median(self.right, self.expected[1])
        lost = max(_median(self.wrong, plain) - plain, 0.0)
        if not plain:
            return
        self._least = max(lost / (lost + saved), LEAST_RATE) if saved > 0 else NEVER


class TripTimes:
    """Seconds of steps that verify several tokens at once, against those of one."""

    def __init__(self) -> None:
        self.plain = Recent()
        self._growth = Recent()

    def note(self, drafted: int, seconds: float) -> None:
        """A step with so many drafted tokens took so long."""
        if not drafted:
            self.plain.note(seconds)
        elif (plain := self.plain.median) and self.plain.count >= ENOUGH:
            self._growth.note((seconds / plain - 1) / drafted)

    @property
    def least_rate(self) -> float:
        """The rate of right guesses at which one more token in a step costs what it saves."""
        return max(LEAST_RATE, self._growth.median)


def _median(times: Recent, expected: float) -> float:
    return times.median if times.count >= ENOUGH else expected
