"""Deadlines that grow where the machine is slow or busy, so that they measure the program."""

import os
import time

# Wall seconds of `_work` on an idle core of a laptop of 2023.
REFERENCE_S = 0.02
# A hang has to end even where the clock or the load average is odd.
MOST = 8.0


def _work() -> float:
    """Wall seconds of a fixed amount of work, the median of five tries."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        sum(i * i for i in range(300_000))
        taken.append(time.perf_counter() - started)
    return sorted(taken)[2]


_AT_START = _work() / REFERENCE_S


def slowdown() -> float:
    """The factor by which waits have to be longer than on an idle machine, from 1 to MOST.

    The larger of the factor measured when the session began and of the processes that compete
    for each core now.
    """
    return min(max(1.0, _AT_START, os.getloadavg()[0] / (os.cpu_count() or 1)), MOST)


def scaled(seconds: float) -> float:
    """Seconds to wait for what takes less than `seconds` on an idle machine."""
    return seconds * slowdown()
