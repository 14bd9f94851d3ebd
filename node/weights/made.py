"""Files that are made from a model for one stage, and can be made again: written whole or not at
all, locked while they are of use, and removed when they are not.

The kernel frees the locks of a process that ends, however it does.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unicluster.errors import UnavailableError
from unicluster.units import format_bytes

log = logging.getLogger(__name__)

PART = ".part"
MAKE_ROOM = "make room, or set HF_HOME to a larger disk"


def hold(file: Path) -> IO[bytes] | None:
    """Opens a file that nobody removes until it is closed; None if there is none."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return None
    if not _lock(stream, fcntl.LOCK_SH) or not _is_at(stream, file):
        stream.close()  # it is just being removed
        return None
    os.utime(file)
    return stream


@contextmanager
def making(file: Path) -> Iterator[IO[bytes]]:
    """A stream to write a file to, which appears when the block ends well, and else never."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}{PART}")
    with temporary.open("wb") as stream:
        try:
            _lock(stream, fcntl.LOCK_EX)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_unused(files: Iterable[Path]) -> int:
    """Removes those files that nobody holds; returns how many bytes they had on the disk."""
    freed = 0
    for file in files:
        try:
            with file.open("rb") as stream:
                if _lock(stream, fcntl.LOCK_EX) and _is_at(stream, file):
                    freed += os.fstat(stream.fileno()).st_blocks * 512
                    file.unlink()
                    log.info("removed %s, which is of no use any more", file)
        except OSError as error:  # another process was quicker, or may more than this one
            log.debug("%s: %s", file, error)
    return freed


def check_space(folder: Path, needed: int, model: str, unused: Iterable[Path] = ()) -> None:
    """Raises UnavailableError where the disk of `folder` has not `needed` bytes for a model, also
    not after removing those of the files `unused`, in their order, that nobody holds.
    """
    for file in unused:
        if shutil.disk_usage(folder).free >= needed:
            return
        remove_unused([file])
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UnavailableError(
            f"{model}: {format_bytes(needed)} are to be stored in {folder}, where "
            f"{format_bytes(free)} are free: {MAKE_ROOM}"
        )


def _lock(stream: IO[bytes], kind: int) -> bool:
    """Locks a file if nobody else does; it is freed when the stream is closed."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except OSError:  # on some network disks there are no locks
        return False
    return True


def _is_at(stream: IO[bytes], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False
