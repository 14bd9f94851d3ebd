"""The cores of a machine, shared by the stages that compute there at the same time.

Workers of one machine may be of several agents. So they meet at a file in the temporary folder: in
it each process has a place of its own, which it locks, and says there whether it computes. The
kernel unlocks the places of processes that have ended.
"""

import contextlib
import fcntl
import functools
import logging
import math
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
WIDTH = 8  # bytes of a place: a float64
# A process that has computed for so long may have ended meanwhile; and after so long it is frozen.
DOUBTFUL_S, FROZEN_S = 1.0, 60.0
# A stage that has computed within so many seconds is about to compute again.
RECENT_S = 0.2


class Cores:
    """A file of places: 0, or the time at which a process has computed last; below 0, the time
    since which it computes. Times are of the monotonic clock, which is one for a machine.

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
            self._times: np.ndarray[Any, np.dtype[np.float64]] = np.frombuffer(self._map)
            self._place = next((p for p in range(PLACES) if self._lock(p)), None)
            if self._place is None:
                raise BlockingIOError(f"all {PLACES} places of {path} are taken")
        except BaseException:
            os.close(self._file)
            raise
        self._times[self._place] = 0.0

    def others(self, recent_s: float = 0.0) -> int:
        """How many other processes compute now, or have computed within the last seconds."""
        now, count = time.monotonic(), 0
        for place in np.flatnonzero(self._times):
            value = float(self._times[place])
            if place == self._place or not math.isfinite(value):
                continue
            passed = now - abs(value)
            if value > 0:
                count += 0 <= passed < recent_s
            elif 0 <= passed < FROZEN_S:
                count += passed < DOUBTFUL_S or not self._is_left(int(place))
        return count

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Meanwhile this process is counted by others."""
        self._times[self._place] = -time.monotonic()
        try:
            yield
        finally:
            self._times[self._place] = time.monotonic()

    def close(self) -> None:
        """Gives the place back. It is of no use afterwards."""
        self._times[self._place] = 0.0
        del self._times
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
        self._times[place] = 0.0
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
