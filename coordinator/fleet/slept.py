"""Sleep of machines, as they tell of it when they are back."""

from collections.abc import Mapping


class Slept:
    """Compares what machines say of their sleep with what they have said before."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        self._new: dict[str, float] = {}

    def note(self, seconds: Mapping[str, float]) -> None:
        """Notes the seconds that each machine was asleep since its agent started.

        Before a machine's first word its sleep is no news, and neither is that of an agent which
        has started anew.
        """
        for machine, now in seconds.items():
            before = self._known.get(machine, now)
            if now > before:
                self._new[machine] = self._new.get(machine, 0.0) + now - before
            self._known[machine] = now

    def take(self) -> dict[str, float]:
        """The seconds of sleep by machine that nobody has taken yet."""
        new, self._new = self._new, {}
        return new
