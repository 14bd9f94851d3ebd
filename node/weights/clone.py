"""Parts of one file in another without a copy, where the disk's file system can share blocks.

Linux alone shares a part of a file (btrfs, XFS, bcachefs); APFS of macOS only whole files.
"""

import logging
import os
import struct
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path

log = logging.getLogger(__name__)

FICLONERANGE = 0x4020940D  # linux/fs.h, with struct file_clone_range
BLOCK = 4096
MOST_BLOCK = 1 << 16


def block_size(file: int) -> int:
    """Bytes that the file system of an open file shares at least, at multiples of them."""
    size = os.fstatvfs(file).f_bsize
    return size if BLOCK <= size <= MOST_BLOCK and not size & (size - 1) else BLOCK


def clone(source: int, start: int, end: int, to: int, at: int) -> bool:
    """Makes the bytes [start, end) of an open file those of another at `at`.

    All are multiples of its block_size. Returns False where the file system can't.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        ioctl(to, FICLONERANGE, struct.pack("=qQQQ", source, start, end - start, at))
    except OSError as error:
        log.debug("blocks can't be shared: %s", error.strerror)
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether files in `folder` can share blocks with those in the folder `source`."""
    try:
        if source.stat().st_dev != folder.stat().st_dev:
            return False
        with (
            tempfile.TemporaryFile(dir=folder) as one,
            tempfile.TemporaryFile(dir=folder) as other,
        ):
            size = block_size(one.fileno())
            one.write(bytes(size))
            one.flush()
            return clone(one.fileno(), 0, size, other.fileno(), 0)
    except OSError as error:  # such as a disk that is full
        log.debug("%s: %s", folder, error)
        return False
