"""Whether a worker that has ended is started again, and after which pause."""

from collections import deque

# A worker that keeps crashing is not helped by starting it again.
RESTARTS = 3
RESTART_WINDOW = 60.0
# Pauses before it is started again double, until it has run for a while. Answers wait for each:
# stages outlive deployments, so crashes of a whole day would add up to pauses of minutes.
FIRST_PAUSE_SECONDS = 0.25
LAST_PAUSE_SECONDS = 2.0
STEADY_SECONDS = 600.0


class Restarts:
    """The starts of the workers of one stage."""

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=RESTARTS)
        self._pause = FIRST_PAUSE_SECONDS

    def after(self, began: float, ended: float, *, ready: bool) -> float | None:
        """Seconds to wait before the next start; None where there is to be none.

        Args:
            began, ended: when the worker did, by one clock, in seconds.
            ready: whether it had loaded its stage. One that can't load won't the next time.
        """
        often = len(self._crashes) == RESTARTS and ended - self._crashes[0] < RESTART_WINDOW
        if not ready or often:
            return None
        if ended - began > STEADY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        self._crashes.append(ended)
        pause, self._pause = self._pause, min(2 * self._pause, LAST_PAUSE_SECONDS)
        return pause
