"""Work on a request that its asker may abandon, from another thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class AbandonedError(Exception):
    """Nobody waits for the result any more."""


class Cancellation:
    """Says whether work is still wanted, and ends what can't look: by the action of `ending`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._end: Callable[[], None] | None = None

    def cancel(self) -> None:
        """From any thread; more than once is no harm."""
        with self._lock:
            self._cancelled = True
            if self._end is not None:
                self._end()

    def check(self) -> None:
        """Raises AbandonedError once `cancel` was called."""
        if self._cancelled:
            raise AbandonedError

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """`end` is called by `cancel` while the block runs. Raises as `check`, before and after."""
        with self._lock:
            self.check()
            self._end = end
        try:
            yield
        finally:
            with self._lock:
                self._end = None
        self.check()
