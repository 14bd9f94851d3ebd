"""Sleep of this machine, as its clocks tell of it afterwards."""

import time
from collections.abc import Callable

# Clocks are read one after the other; suspending takes longer than this.
LEAST_SECONDS = 1.0


def _asleep_seconds() -> float:
    """Seconds that the machine has been asleep since it booted, less a constant.

    One clock goes on in sleep and the other stands. 0.0 where there are no such clocks.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if hasattr(time, "CLOCK_UPTIME_RAW"):  # macOS, whose CLOCK_MONOTONIC goes on
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return 0.0


class Sleep:
    """Seconds that the machine was asleep since this was made."""

    def __init__(self, asleep: Callable[[], float] = _asleep_seconds) -> None:
        self._asleep = asleep
        self._before = asleep()

    @property
    def seconds(self) -> float:
        slept = self._asleep() - self._before
        return slept if slept >= LEAST_SECONDS else 0.0
