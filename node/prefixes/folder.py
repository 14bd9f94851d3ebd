"""The directory of saved prefixes on this machine, which never takes more than its limit.

All stages of the machine share it, those of other processes and models too: each has a folder
inside, named by what its caches depend on. Bytes are counted by looking, under a lock, whenever
room is made; the files used longest ago make it.
"""

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from node.prefixes.format import FRONT_BYTES, is_older

# Under the directory of the user's choice, which may have other things in it.
PREFIXES = "prefixes"
LOCK = ".lock"
STATE = ".state"  # caches of a stage
TOKENS = ".tokens"  # of the head: the tokens that the caches are of
BLOCK = ".block"  # caches of some tokens, which several prefixes may begin with
PART = ".part"  # still being written
STEP_NS = 1000  # between the times of files that are used together
SUFFIXES = (STATE, TOKENS, BLOCK, PART)


def default_directory() -> Path:
    """Where this user's caches are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unicluster"


class TooLargeError(Exception):
    """A file for which there is no room within the limit."""


@dataclass
class _Group:
    """The files of one prefix in one folder. used_s: when it last was, in seconds since 1970."""

    paths: list[Path] = field(default_factory=list)
    nbytes: int = 0
    used_s: float = 0.0


class Folder:
    """One stage's folder inside the directory `root`, whose limit is `most` bytes in all."""

    def __init__(self, root: Path, name: str, most: int) -> None:
        """Raises OSError where nothing can be written, or the directory is another user's."""
        self.root = root / PREFIXES
        self.path = self.root / name
        self.most = most
        root.mkdir(parents=True, exist_ok=True)
        for directory in (self.root, self.path):
            _private(directory)
        with self._locked():
            self._remove_stale()
            with contextlib.suppress(TooLargeError):  # of others, which are still being written
                self._make_room(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of prefixes in the directory now."""
        return sum(group.nbytes for group in self._groups())

    def size(self, name: str, suffix: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return (self.path / (name + suffix)).lstat().st_size
        except FileNotFoundError:
            return None

    def names(self, suffix: str) -> list[str]:
        """Names of the files with that suffix, those first that were used longest ago."""
        found = [entry for entry in _scan(self.path) if entry.name.endswith(suffix)]
        found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
        return [entry.name.removesuffix(suffix) for entry in found]

    def open(self, name: str, suffix: str) -> int:
        """A descriptor to read a file, which has been used now. Raises OSError."""
        path = self.path / (name + suffix)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{path} is no file")
        return descriptor

    def touch(self, name: str, blocks: Sequence[str] = ()) -> None:
        """Marks a prefix as the one used last, and before it its blocks, the first of them last:
        without the blocks before it none is of use, nor the prefix without them all.
        """
        now = time.time_ns()
        files = [[block + BLOCK] for block in blocks] + [[name + STATE, name + TOKENS]]
        for number, group in enumerate(files):
            used = now - number * STEP_NS
            for file in group:
                with contextlib.suppress(OSError):
                    os.utime(self.path / file, ns=(used, used))

    def touch_as(self, name: str) -> None:
        """Marks the tokens of a prefix as used when its caches were."""
        with contextlib.suppress(OSError):
            used = (self.path / (name + STATE)).lstat().st_mtime_ns
            os.utime(self.path / (name + TOKENS), ns=(used, used))

    def erase(self, name: str) -> None:
        """Removes the files of a prefix. Raises OSError where they can't be."""
        for suffix in (TOKENS, STATE, BLOCK):
            (self.path / (name + suffix)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str, suffix: str, nbytes: int) -> Iterator[int]:
        """A descriptor to write a file of `nbytes`, which is there once the block has ended well.

        Others are removed until there is room for it, and the room is taken at once. Raises
        TooLargeError or OSError, and then there is no such file.
        """
        part = self.path / f"{name}{suffix}.{secrets.token_hex(4)}{PART}"
        with self._locked():
            self._make_room(nbytes)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(part, flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _take_room(descriptor, nbytes)
            except BaseException:
                os.close(descriptor)
                part.unlink(missing_ok=True)
                raise
        try:
            yield descriptor
            os.fsync(descriptor)  # else a file may have its name, and not its bytes, without power
            part.replace(self.path / (name + suffix))
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _make_room(self, nbytes: int) -> None:
        """Removes those used longest ago until `nbytes` more are within the limit."""
        if nbytes > self.most:
            raise TooLargeError
        groups = self._groups()
        used = sum(group.nbytes for group in groups)
        for group in sorted(groups, key=lambda group: group.used_s):
            if used + nbytes <= self.most:
                return
            if any(path.name.endswith(PART) for path in group.paths):
                continue
            for path in group.paths:
                path.unlink(missing_ok=True)
            used -= group.nbytes
        if used + nbytes > self.most:
            raise TooLargeError

    def _groups(self) -> list[_Group]:
        """The prefixes of all folders, and each file that is still being written."""
        groups: dict[tuple[str, str], _Group] = {}
        for folder in _scan(self.root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _scan(Path(folder.path)):
                if not entry.name.endswith(SUFFIXES):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                stem = entry.name if entry.name.endswith(PART) else Path(entry.name).stem
                group = groups.setdefault((folder.name, stem), _Group())
                group.paths.append(Path(entry.path))
                group.nbytes += found.st_size
                group.used_s = max(group.used_s, found.st_mtime)
        return list(groups.values())

    def _remove_stale(self) -> None:
        """Removes files of earlier formats, and those that nobody is writing any more: their
        writers hold a lock on them.
        """
        for path in [path for group in self._groups() for path in group.paths]:
            if not path.name.endswith(PART):
                _remove_older(path)
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                path.unlink(missing_ok=True)
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that use the directory; never held for long."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.root / LOCK, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _private(directory: Path) -> None:
    """Makes a directory that is this user's alone. Raises OSError where it can't be."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(20, "it is no directory", str(directory))
    if found.st_uid != os.geteuid():
        raise PermissionError(13, "it is another user's", str(directory))
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)


def _remove_older(path: Path) -> None:
    """Removes a file of an earlier format, of which nobody has any use."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            older = is_older(os.read(descriptor, FRONT_BYTES))
        finally:
            os.close(descriptor)
        if older:
            path.unlink(missing_ok=True)


def _take_room(descriptor: int, nbytes: int) -> None:
    """Makes a file `nbytes` long; where the system can, the disk has room for them then."""
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def _scan(directory: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
