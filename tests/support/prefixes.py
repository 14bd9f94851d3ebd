"""Prefixes on disk, for tests: stores and indexes over a directory, as workers have them."""

import stat
from pathlib import Path

from node.prefixes.folder import PREFIXES, Folder
from node.prefixes.index import PrefixIndex
from node.prefixes.store import PrefixStore

KEY = b"k" * 32
LIMIT = 1 << 30


def store_in(
    directory: Path, name: str = "stage", limit: int = LIMIT, key: bytes = KEY
) -> PrefixStore:
    """A store as a worker's, of which the first process may have ended."""
    return PrefixStore(Folder(directory, name, limit), key)


def index_in(directory: Path, name: str = "stage", limit: int = LIMIT) -> PrefixIndex:
    """The index of a head that starts now."""
    return PrefixIndex(store_in(directory, name, limit))


def files_in(directory: Path, suffix: str = "") -> list[Path]:
    """Files of prefixes in a directory, of all stages."""
    found = (directory / PREFIXES).glob(f"*/*{suffix}")
    return sorted(path for path in found if stat.S_ISREG(path.lstat().st_mode))


def counted(directory: Path) -> int:
    """Bytes of all files of prefixes in a directory."""
    return sum(path.stat().st_size for path in files_in(directory))
