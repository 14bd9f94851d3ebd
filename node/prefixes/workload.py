"""Whether a machine computes answers now, for what may wait until it does not."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Between two frames of an answer a machine may rest for a moment.
QUIET_SECONDS = 0.5


class Workload:
    """Work on answers that runs now, or did a moment ago. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._ended_s = float("-inf")  # by time.monotonic

    @property
    def busy(self) -> bool:
        return self._running > 0 or time.monotonic() - self._ended_s < QUIET_SECONDS

    def begin(self) -> None:
        with self._lock:
            self._running += 1

    def end(self) -> None:
        with self._lock:
            self._running -= 1
            self._ended_s = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work for as long as the block runs."""
        self.begin()
        try:
            yield
        finally:
            self.end()
