"""The cores of a machine, shared by the stages that compute there at the same time.

Workers of one machine may be of several agents. So they meet at a file in the temporary folder: in
it each process has a place of its own, which it locks, and says there whether it computes. The
kernel unlocks the places of processes that have ended.
"""

import contextlib
import fcntl
import functools
import logging
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unicluster.errors import in_one_line

log = logging.getLogger("unicluster.llama")

PLACES = 64
# Of a place, float64s: since when the process computes, by the monotonic clock, which is one for a
# machine, or 0 if it does not; and with how many threads.
SINCE, THREADS = range(2)
FIELDS = 2
WIDTH = 8 * FIELDS  # bytes of a place
# A process that has computed for so long may have ended meanwhile; and after so long it is frozen.
DOUBTFUL_S, FROZEN_S = 1.0, 60.0
# Processes have no more threads than that.
MOST_THREADS = 4096.0

Numbers = np.ndarray[Any, np.dtype[np.float64]]


class Cores:
    """A file of places, one of which is this process's.

    For one thread. Raises OSError where the file can't be used, or all places are taken.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        try:
            state = os.fstat(self._file)
            if state.st_uid != os.geteuid() or not stat.S_ISREG(state.st_mode):
                raise PermissionError(f"{path} is not a file of this user")
            os.ftruncate(self._file, PLACES * WIDTH)
            self._map = mmap.mmap(self._file, PLACES * WIDTH)
            self._places: Numbers = np.frombuffer(self._map).reshape(PLACES, FIELDS)
            place = next((p for p in range(PLACES) if self._lock(p)), None)
            if place is None:
                raise BlockingIOError(f"all {PLACES} places of {path} are taken")
        except BaseException:
            os.close(self._file)
            raise
        self._place = place
        self._ours: Numbers = self._places[place]
        self._ours[:] = 0.0

    def computing_now(self) -> list[int]:
        """Threads of each other process that computes now."""
        now = time.monotonic()
        since, threads = self._places[:, SINCE], self._places[:, THREADS]
        with np.errstate(invalid="ignore"):
            passed = now - since
            valid = (since > 0) & (threads >= 1) & (threads <= MOST_THREADS)
            places = np.flatnonzero(valid & (passed >= 0) & (passed < FROZEN_S))
        return [
            int(threads[place])
            for place in places
            if place != self._place
            and (passed[place] < DOUBTFUL_S or not self._is_left(int(place)))
        ]

    @contextlib.contextmanager
    def computing(self, threads: int) -> Iterator[None]:
        """Meanwhile others know that this process computes."""
        self._ours[THREADS] = threads
        self._ours[SINCE] = time.monotonic()
        try:
            yield
        finally:
            self._ours[SINCE] = 0.0

    def close(self) -> None:
        """Gives the place back. It is of no use afterwards."""
        self._ours[:] = 0.0
        del self._ours, self._places
        self._map.close()
        os.close(self._file)

    def _lock(self, place: int) -> bool:
        """Whether a place is this process's now; always so where it was before."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, WIDTH, place * WIDTH)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _is_left(self, place: int) -> bool:
        """Whether the process at a place has ended, which is then free again."""
        if not self._lock(place):
            return False
        self._places[place] = 0.0
        fcntl.lockf(self._file, fcntl.LOCK_UN, WIDTH, place * WIDTH)
        return True


@functools.cache
def shared_cores() -> Cores | None:
    """This process's place among all of this user and machine; None where there can't be any."""
    path = Path(tempfile.gettempdir()) / f"unicluster-cores-{os.geteuid()}"
    try:
        return Cores(path)
    except OSError as error:
        log.info("stages here can't share cores by %s: %s", path, in_one_line(error))
        return None
