"""Whether to guess at all: by how often guesses are right, and what right and wrong ones cost."""

from collections.abc import Callable, Sequence

from node.metering.meters import Recent

# A running mean of this many guesses.
RECENT_GUESSES = 16
# Below this rate guesses never pay.
LEAST_RATE = 0.1
# Where wrong guesses are not measured yet, and nothing is lost by waiting for better ones.
CAUTIOUS_RATE = 0.5
# Guessing begins again at a rate this much above the one at which it ends.
HYSTERESIS = 1.2
# While it doesn't pay, only every so many-th token is guessed after.
PROBE_TOKENS = 64
# Of what is compared without being sent, it is so only from this rate on.
PROBED_RATE = 0.5
# Times that a median is of: few of those with guesses, which may be rare.
RECENT_PLAIN, RECENT_GUESSED = 32, 16
# A right guess has to save this part of a token's time: what it is chosen by is measured.
MARGIN = 0.05
# Steps of a kind, before their times are believed.
ENOUGH = 8
# A rate that no guesses have.
NEVER = 2.0


class HitRate:
    """Running rate of right guesses: `expected`, before there are any."""

    def __init__(self, expected: float = 0.5) -> None:
        self.rate = expected
        self._count = 2

    def note(self, *, right: bool) -> None:
        """A guess was verified, or would have been."""
        self._count = min(self._count + 1, RECENT_GUESSES)
        self.rate += (right - self.rate) / self._count


class _Sort:
    """Guesses of one sort, and whether those pay."""

    def __init__(self, expected: float, *, is_open: bool) -> None:
        self.hits = HitRate(expected)
        self.is_open = is_open


class Gate:
    """Lets an answer guess while that pays: from a rate of right guesses of `least` on.

    Guesses of several sorts have a rate each. `expected`: what the rates are before there are any
    guesses. `closed`: guesses are compared with the model's choices also while none are sent, and
    none are sent before these have shown that they would pay.
    """

    def __init__(
        self,
        least: Callable[[], float],
        expected: Sequence[float] = (0.5,),
        *,
        closed: bool = False,
    ) -> None:
        self._least = least
        self._sorts = [_Sort(rate, is_open=not closed) for rate in expected]
        self._compares = closed
        self._tokens = 0

    def rate(self, sort: int = 0) -> float:
        """Running rate of right guesses of a sort."""
        return self._sorts[sort].hits.rate

    def is_open(self, sort: int = 0) -> bool:
        """Whether guesses of a sort pay now."""
        return self._sorts[sort].is_open

    def lets_pass(self, sort: int = 0) -> bool:
        """Whether to guess now: because it pays, or to try whether it would."""
        if self.is_open(sort):
            return True
        # What is compared anyway shows that it is mostly wrong without being sent.
        tried = not self._compares or self.rate(sort) >= PROBED_RATE
        return tried and self._tokens % PROBE_TOKENS == PROBE_TOKENS - 1

    def note(self, sort: int = 0, *, right: bool) -> None:
        """A guess was verified, or would have been."""
        noted = self._sorts[sort]
        noted.hits.note(right=right)
        least = self._least()
        noted.is_open = noted.hits.rate >= (least if noted.is_open else least * HYSTERESIS)

    def next_token(self) -> None:
        """The model has chosen a token."""
        self._tokens += 1


class PipedTimes:
    """Seconds from one token of an answer to the next: plain, after a right guess, after a wrong,
    and with guesses on their way behind it.

    `expected`: seconds of the first two as the stages' times let expect them; 0 for not known.
    `unknown`: the least rate until there are any times.
    """

    def __init__(self, unknown: float = LEAST_RATE) -> None:
        self.plain = Recent(RECENT_PLAIN)
        self.right, self.wrong, self.behind = (Recent(RECENT_GUESSED) for _ in range(3))
        self.expected = 0.0, 0.0
        self._least = unknown

    @property
    def least_rate(self) -> float:
        """The rate of right guesses at which those that are wrong cost what the others save."""
        return self._least

    def weigh(self) -> None:
        """Has `least_rate` follow what was measured.

        A row of guesses slows the token before it down, as each takes its turn at every stage, and
        a wrong one the token after it.
        """
        plain = _median(self.plain, self.expected[0])
        if not plain:
            return
        saved = plain - _median(self.right, self.expected[1])
        # Until it is known: half the time of the slowest stage, where a doomed frame may be.
        wrong = _median(self.wrong, plain + self.expected[1] / 2)
        behind = _median(self.behind, plain)
        lost = max(wrong - plain, 0.0) + max(behind - plain, 0.0)
        self._least = max(lost / (lost + saved), LEAST_RATE) if saved > MARGIN * plain else NEVER


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
