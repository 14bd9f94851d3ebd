"""Prefixes of prompts on this machine's disk, written and read beside the compute thread.

Nothing here raises for what a disk may do: it is full, read-only, slow, or has files that are
damaged. Then a prefix is not there, and the log says why, once for each reason.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from node.prefixes.blocks import join, split
from node.prefixes.folder import BLOCK, STATE, TOKENS, Folder, TooLargeError
from node.prefixes.format import Contents, DamagedError, Sealed, read
from node.prefixes.saved import SavedEntry
from node.prefixes.workload import Workload
from unicluster import failpoints
from unicluster.units import format_bytes

log = logging.getLogger("unicluster.prefixes")

# Caches that wait to be written stay in memory: of more bytes than these, others are not written.
MOST_WAITING_BYTES = 1 << 30
READERS = 2
# How often writing that may wait looks whether the machine is idle.
LOOK_SECONDS = 0.05


@dataclass
class _Waiting:
    """Files of a prefix that are to be written. idle: they may wait until no answer runs."""

    nbytes: int
    idle: bool


class PrefixStore:
    """Saved caches of one stage by name. Threads may share it.

    workload: of the stage's machine; whoever computes there says so.
    """

    def __init__(self, folder: Folder, key: bytes) -> None:
        """key: the machine's, with which its files are sealed."""
        self._folder = folder
        self._key = key
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="prefixes-out", initializer=_nice)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="prefixes-in")
        self._lock = threading.Lock()
        self._waiting: dict[str, _Waiting] = {}  # by name
        self._closing = False
        self.workload = Workload()
        self._warned: set[str] = set()
        self.most = folder.most
        self.nbytes = folder.nbytes  # of the whole directory, when it was looked at last

    @classmethod
    def at(cls, directory: str, name: str, most: int, key: bytes) -> "PrefixStore | None":
        """The store in the folder `name` of a directory; None where it can't be used, with a
        warning.
        """
        try:
            return cls(Folder(Path(directory), name, most), key)
        except OSError as error:
            log.warning(
                "prompt caches are not kept on disk: %s: %s", directory, error.strerror or error
            )
            return None

    @property
    def waiting(self) -> int:
        """Bytes of prefixes that are still to be written; those of blocks that are there count."""
        with self._lock:
            return sum(each.nbytes for each in self._waiting.values())

    def hurry(self, name: str) -> bool:
        """Whether a prefix waits to be written; now it does not wait for the machine to be idle."""
        with self._lock:
            waiting = [self._waiting.get(name + suffix) for suffix in (STATE, TOKENS)]
            for each in waiting:
                if each is not None:
                    each.idle = False
            return waiting[0] is not None

    def put(
        self,
        name: str,
        entries: Sequence[SavedEntry],
        blocks: Sequence[str] = (),
        *,
        idle: bool = False,
    ) -> None:
        """Writes a prefix, soon. Its arrays must not change.

        blocks: names of those that it begins with; such as are on disk are not written again.
        idle: writes while the machine does nothing else.
        """
        parts, rest = split(entries, len(blocks))
        names = list(blocks[: len(parts)])
        files = [
            (block, BLOCK, Sealed(block, self._key, part))
            for block, part in zip(names, parts, strict=True)
        ]
        files.append((name, STATE, Sealed(name, self._key, rest, names)))
        self._put(name, STATE, files, idle)

    def put_tokens(self, name: str, entries: Sequence[SavedEntry], *, idle: bool = False) -> None:
        """Writes the tokens that a prefix is of, after its caches."""
        self._put(name, TOKENS, [(name, TOKENS, Sealed(name, self._key, entries))], idle)

    def read(self, name: str) -> "Future[list[SavedEntry] | None]":
        """Begins to read a prefix: None where it is not there whole and unchanged."""
        return self._readers.submit(self._read_whole, name)

    def tokens(self) -> list[tuple[str, list[SavedEntry]]]:
        """Tokens of all prefixes by name, those first that were used longest ago. Blocks."""
        names = self._folder.names(TOKENS)
        found = [(name, self._read(name, TOKENS)) for name in names]
        return [(name, contents.entries) for name, contents in found if contents is not None]

    def erase(self, name: str) -> None:
        """Removes a prefix, soon, but not its blocks, which others may begin with."""
        self._writer.submit(self._erase, name)

    def settle(self, seconds: float) -> bool:
        """Waits until all is written, for so long at most; whether it is."""
        until = time.monotonic() + seconds
        while self.waiting and time.monotonic() < until:
            time.sleep(0.01)
        return not self.waiting

    def close(self) -> None:
        """Writes what waits to be written. The store is of no use afterwards."""
        self._closing = True
        self._writer.shutdown()
        self._readers.shutdown()

    def _put(
        self, name: str, suffix: str, files: "Sequence[tuple[str, str, Sealed]]", idle: bool
    ) -> None:
        nbytes = sum(sealed.nbytes for _, _, sealed in files)
        with self._lock:
            if name + suffix in self._waiting:
                return
            total = sum(each.nbytes for each in self._waiting.values())
            if total and total + nbytes > MOST_WAITING_BYTES:
                self._warn("slow", "the disk is too slow for all of them")
                return
            self._waiting[name + suffix] = _Waiting(nbytes, idle)
        self._writer.submit(self._write, name, suffix, files)

    def _write(self, name: str, suffix: str, files: "Sequence[tuple[str, str, Sealed]]") -> None:
        waiting = self._waiting[name + suffix]
        blocks = [file for file, kind, _ in files if kind == BLOCK]

        def write() -> None:
            failpoints.reach("prefixes.write")
            if waiting.nbytes > self.most:
                raise TooLargeError
            there = [self._folder.size(file, kind) == sealed.nbytes for file, kind, sealed in files]
            if any(there):  # else they might go to make room for the others
                self._folder.touch(name, blocks)
            for (file, kind, sealed), is_there in zip(files, there, strict=True):
                if not is_there:
                    self._write_file(file, kind, sealed, waiting)
            if suffix == STATE:
                self._folder.touch(name, blocks)
            else:
                self._folder.touch_as(name)

        self._guarded(name, write)
        self._guarded(name, self._count)
        with self._lock:
            self._waiting.pop(name + suffix, None)

    def _write_file(self, name: str, suffix: str, sealed: Sealed, waiting: _Waiting) -> None:
        with (
            self._folder.writing(name, suffix, sealed.nbytes) as descriptor,
            open(descriptor, "wb", buffering=0, closefd=False) as file,
        ):
            sealed.write(file, lambda: self._await_idle(waiting))

    def _await_idle(self, waiting: _Waiting) -> None:
        """Returns when no answer runs here, or at once where something behind can't wait."""
        while waiting.idle and self.workload.busy and not self._closing:
            with self._lock:
                if not all(each.idle for each in self._waiting.values()):
                    return
            time.sleep(LOOK_SECONDS)

    def _count(self) -> None:
        self.nbytes = self._folder.nbytes

    def _read_whole(self, name: str) -> list[SavedEntry] | None:
        """A prefix with its blocks."""
        rest = self._read(name, STATE)
        if rest is None:
            return None
        parts = []
        for block in rest.blocks:
            part = self._read(block, BLOCK)
            if part is None:
                return None
            parts.append(part.entries)
        whole: list[SavedEntry] = []
        if not self._guarded(name, lambda: whole.extend(join(parts, rest.entries))):
            return None
        self._folder.touch(name, rest.blocks)
        return whole

    def _read(self, name: str, suffix: str) -> Contents | None:
        contents: list[Contents] = []

        def load() -> None:
            failpoints.reach("prefixes.read")
            descriptor = self._folder.open(name, suffix)
            with open(descriptor, "rb", buffering=0) as file:
                contents.append(read(file, os.fstat(descriptor).st_size, name, self._key))

        return contents[0] if self._guarded(name, load) else None

    def _erase(self, name: str) -> None:
        self._guarded(name, lambda: self._folder.erase(name))
        self._guarded(name, self._count)

    def _guarded(self, name: str, work: Callable[[], None]) -> bool:
        """Whether `work` was done; else the reason is logged, unless it was before."""
        try:
            work()
        except FileNotFoundError:
            return False  # as it is of one that was removed to make room
        except TooLargeError:
            self._warn("large", f"one takes more than {format_bytes(self.most)}")
        except OSError as error:
            self._warn(f"errno {error.errno}", error.strerror or str(error))
        except (DamagedError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._warn("damaged", f"{name}: {error}; it is removed")
            self._guarded(name, lambda: self._folder.erase(name))
        except Exception as error:  # as MemoryError: answers must go on without
            self._warn(type(error).__name__, f"{type(error).__name__}: {error}")
        else:
            return True
        return False

    def _warn(self, kind: str, reason: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s: a prompt cache on disk is gone without: %s", self._folder.root, reason)


def _nice() -> None:
    """Lets others have the processor first, where threads have priorities of their own."""
    if hasattr(os, "setpriority") and os.uname().sysname == "Linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
