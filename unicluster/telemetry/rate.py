"""How fast a counter grows."""

import time


class Rate:
    """Rate of a counter between two readings."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the last reading."""
        return time.monotonic() - self._since

    def next(self, count: int) -> float:
        """Takes a reading; returns the increase per second since the last, to two decimals."""
        per_second = (count - self._count) / max(self.seconds, 1e-9)
        self._count, self._since = count, time.monotonic()
        return round(per_second, 2)
