"""Which of several settings is the fastest, tried out while work goes on."""

from collections.abc import Sequence
from statistics import median

# A trial times the present setting and a neighbour in turns: so many blocks of each, and steps in a
# block, the first of which, just after the change, doesn't count.
BLOCKS = 2
STEPS = 3
# A neighbour must be so much faster to be taken: a trial of few steps on a busy machine is rough.
BETTER = 0.92
# Steps between trials, doubled while nothing changes: what else runs on a machine comes and goes.
LEAST_REST, MOST_REST = 64, 1024


class Fastest:
    """The fastest of ordered settings, such as numbers of threads.

    Each step is done with `setting`, and reported by `note`. Neighbours of the present best are
    tried one after the other, at once in the beginning and later ever more rarely.
    """

    def __init__(self, settings: Sequence[int], best: int) -> None:
        """`best` of `settings`, which ascend, is where it begins. Raises ValueError if it isn't."""
        self._settings = list(settings)
        self._at = self._settings.index(best)
        self._untried = self._neighbours()
        self._rest = LEAST_REST
        self._left = 0  # steps until the next trial
        self._kind: object = None
        self._plan: list[
            tuple[int, bool]
        ] = []  # steps of a trial to come: place, whether it counts
        self._times: dict[int, list[float]] = {}

    @property
    def best(self) -> int:
        return self._settings[self._at]

    @property
    def setting(self) -> int:
        """The setting of the next step."""
        return self._settings[self._plan[0][0]] if self._plan else self.best

    def note(self, kind: object, seconds: float) -> None:
        """Time of the step just done. Only steps of one kind are compared.

        `kind`: any value, such as the number of tokens; another one begins a trial anew.
        """
        if self._plan:
            if kind != self._kind:
                self._begin(kind)
                return
            place, counts = self._plan.pop(0)
            if counts:
                self._times.setdefault(place, []).append(seconds)
            if not self._plan:
                self._decide()
        elif self._left:
            self._left -= 1
        elif self._untried:
            self._begin(kind)
        else:
            self._untried, self._left = self._neighbours(), self._rest
            self._rest = min(2 * self._rest, MOST_REST)

    def _begin(self, kind: object) -> None:
        self._kind, self._times = kind, {}
        block = [
            (place, step > 0) for place in (self._at, self._untried[0]) for step in range(STEPS)
        ]
        self._plan = block * BLOCKS

    def _decide(self) -> None:
        other = self._untried.pop(0)
        step = other - self._at
        if median(self._times[other]) < BETTER * median(self._times[self._at]):
            self._at = other
            onward = other + step
            self._untried = [onward] if 0 <= onward < len(self._settings) else []
            self._rest = LEAST_REST

    def _neighbours(self) -> list[int]:
        """Places beside the present one, fewer first: that also leaves more to others."""
        beside = (self._at - 1, self._at + 1)
        return [place for place in beside if 0 <= place < len(self._settings)]


def doublings(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`, which is among them."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return [*powers, most]
