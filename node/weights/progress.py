"""Whether a transfer gets on: it may be called off, and must not trickle."""

import threading
import time

from unicluster.deadlines import floor_seconds
from unicluster.errors import UnavailableError
from unicluster.units import format_bytes

# Any network gives more, also shared by many transfers at once.
SLOWEST_BYTES_A_SECOND = 2048


class StoppedError(Exception):
    """Nobody waits for the transfer any more."""


class Stop:
    """Says to work on other threads whether anybody waits for it still."""

    def __init__(self) -> None:
        self._set = threading.Event()

    def set(self) -> None:
        """From any thread, once nobody waits."""
        self._set.set()

    def check(self) -> None:
        """Raises StoppedError once `set` was called."""
        if self._set.is_set():
            raise StoppedError

    def wait(self, seconds: float) -> None:
        """Waits; raises as `check` does, as soon as it would."""
        if self._set.wait(seconds):
            raise StoppedError


class Rate:
    """The rate of one transfer, over windows of seconds that were spent waiting for it."""

    def __init__(self, who: str) -> None:
        """who: sends; for the error."""
        self._who = who
        self.window_s = floor_seconds()
        self._waited = 0.0
        self._bytes = 0
        self._began = time.monotonic()

    def waiting(self) -> None:
        """The next bytes are waited for from now on."""
        self._began = time.monotonic()

    def note(self, count: int) -> None:
        """Counts bytes that came. Raises UnavailableError after a window with too few."""
        self._waited += time.monotonic() - self._began
        self._bytes += count
        if self._waited < self.window_s:
            return
        if self._bytes < SLOWEST_BYTES_A_SECOND * self._waited:
            raise self.too_slow()
        self._waited, self._bytes = 0.0, 0

    def too_slow(self) -> UnavailableError:
        """The error for a transfer that does not get on."""
        seconds, came = max(self._waited, self.window_s), format_bytes(self._bytes)
        return UnavailableError(f"{self._who} has sent no more than {came} in {seconds:.0f} s")
