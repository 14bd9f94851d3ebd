"""How fast a counter grows."""

import time


class Rate:
    """Of a number that only grows, from one look to the next."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the last look."""
        return time.monotonic() - self._since

    def next(self, count: int) -> float:
        """How much more it was a second, since the last look, to two decimals; looks."""
        per_second = (count - self._count) / max(self.seconds, 1e-9)
        self._count, self._since = count, time.monotonic()
        return round(per_second, 2)
