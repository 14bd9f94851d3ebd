"""Which of several settings is the fastest, tried out while work goes on."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean

# A trial times the present setting and a neighbour in turns: so many blocks of each, and steps in a
# block, the first of which, just after the change, doesn't count.
BLOCKS = 3
STEPS = 4
# A neighbour must be so much faster to be taken: a trial of few steps on a busy machine is rough.
BETTER = 0.92
# A neighbour is not tried to the end that takes so many times as long.
HOPELESS = 2.0
# Steps between trials, doubled while nothing changes: what else runs on a machine comes and goes.
LEAST_REST, MOST_REST = 64, 1024
# A trial comes early where the last steps take so many times as long as they did, or so much less;
# the first time after so many steps, and twice as many whenever it was in vain.
CHANGED = 1.3
WATCHED = 12
LEAST_PATIENCE = 24
# How fast the usual time follows those of steps, which grow with an answer's length.
FOLLOW = 1 / 64
# Steps of another kind in a row, after which a trial goes on with them.
STRANGE = 8


class Fastest:
    """The fastest of ordered settings, such as numbers of threads.

    Each step is done with `setting`, and reported by `note`. Neighbours of the present best are
    tried one after the other: at once in the beginning, when steps take another time than they
    did, and otherwise ever more rarely.
    """

    def __init__(self, settings: Sequence[int], best: int) -> None:
        """`best` of `settings`, which ascend, is where it begins. Raises ValueError if it isn't."""
        self._settings = list(settings)
        self._at = self._settings.index(best)
        self._untried = self._neighbours()
        self._rest, self._patience = LEAST_REST, LEAST_PATIENCE
        self._passed = 0  # steps since the last trial
        self._is_early = False
        self._kind: object = None
        self._strange = 0
        # Steps of a trial to come: place, whether it counts.
        self._plan: deque[tuple[int, bool]] = deque()
        self._times: dict[int, list[float]] = {}
        self._usual = 0.0
        self._lately: deque[float] = deque(maxlen=WATCHED)

    @property
    def best(self) -> int:
        return self._settings[self._at]

    @property
    def setting(self) -> int:
        """The setting of the next step."""
        return self._settings[self._plan[0][0]] if self._plan else self.best

    @property
    def settled(self) -> bool:
        """Whether no trial is due that began with a change, or with the first step."""
        return not self._plan and not self._untried

    def note(self, kind: object, seconds: float) -> None:
        """Time of the step just done, with `setting`. Only steps of one kind are compared.

        `kind`: any value, such as the number of tokens.
        """
        if self._plan:
            self._note_trial(kind, seconds)
        elif self._untried:
            self._begin(kind)
        else:
            self._passed += 1
            early = self._has_changed(kind, seconds) and self._passed >= self._patience
            if early or self._passed >= self._rest:
                self._untried, self._is_early = self._neighbours(), early

    def _note_trial(self, kind: object, seconds: float) -> None:
        if kind != self._kind:
            self._strange += 1
            if self._strange >= STRANGE:
                self._begin(kind)
            return
        self._strange = 0
        place, counts = self._plan.popleft()
        if counts:
            self._times.setdefault(place, []).append(seconds)
        if not self._plan or self._is_hopeless():
            self._decide()

    def _begin(self, kind: object) -> None:
        self._kind, self._times, self._strange = kind, {}, 0
        block = [
            (place, step > 0) for place in (self._at, self._untried[0]) for step in range(STEPS)
        ]
        self._plan = deque(block * BLOCKS)

    def _is_hopeless(self) -> bool:
        present, other = (self._times.get(place, []) for place in (self._at, self._untried[0]))
        return bool(other) and min(other) > HOPELESS * max(present)

    def _decide(self) -> None:
        self._plan.clear()
        other = self._untried.pop(0)
        step = other - self._at
        if _typical(self._times[other]) < BETTER * _typical(self._times[self._at]):
            self._at = other
            onward = other + step
            self._untried = [onward] if 0 <= onward < len(self._settings) else []
            self._rest, self._patience = LEAST_REST, LEAST_PATIENCE
        elif not self._untried and self._is_early:
            self._patience = min(2 * self._patience, MOST_REST)
        elif not self._untried:
            self._rest = min(2 * self._rest, MOST_REST)
        self._passed = 0
        self._usual = _typical(self._times[self._at])
        self._lately.clear()

    def _has_changed(self, kind: object, seconds: float) -> bool:
        """Whether the last steps took another time than they did when this setting was tried."""
        if kind != self._kind or not self._usual:
            return False
        self._lately.append(seconds)
        self._usual += FOLLOW * (seconds - self._usual)
        if len(self._lately) < WATCHED:
            return False
        now = _typical(self._lately)
        return not self._usual / CHANGED <= now <= CHANGED * self._usual

    def _neighbours(self) -> list[int]:
        """Places beside the present one, fewer first: that also leaves more to others."""
        beside = (self._at - 1, self._at + 1)
        return [place for place in beside if 0 <= place < len(self._settings)]


def _typical(times: Sequence[float] | deque[float]) -> float:
    """Mean of times, but for the longest: of many steps one meets something rare."""
    return fmean(sorted(times)[: max(len(times) - 1, 1)])


def doublings(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`, which is among them."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return [*powers, most]
