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
from pathlib import Path

from node.prefixes.folder import STATE, TOKENS, Folder, TooLargeError
from node.prefixes.format import DamagedError, Sealed, read
from node.prefixes.saved import SavedEntry
from unicluster import failpoints
from unicluster.units import format_bytes

log = logging.getLogger("unicluster.prefixes")

# Caches that wait to be written stay in memory: of more bytes than these, others are not written.
MOST_WAITING_BYTES = 1 << 30
READERS = 2


class PrefixStore:
    """Saved caches of one stage by name. Threads may share it."""

    def __init__(self, folder: Folder, key: bytes) -> None:
        """key: the machine's, with which its files are sealed."""
        self._folder = folder
        self._key = key
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="prefixes-out", initializer=_nice)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="prefixes-in")
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}  # bytes by name
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
        """Bytes that are still to be written."""
        with self._lock:
            return sum(self._waiting.values())

    def put(self, name: str, entries: Sequence[SavedEntry], suffix: str = STATE) -> None:
        """Writes a prefix, soon. Its arrays must not change."""
        sealed = Sealed(name, self._key, entries)
        with self._lock:
            if name + suffix in self._waiting:
                return
            total = sum(self._waiting.values())
            if total and total + sealed.nbytes > MOST_WAITING_BYTES:
                self._warn("slow", "the disk is too slow for all of them")
                return
            self._waiting[name + suffix] = sealed.nbytes
        self._writer.submit(self._write, name, suffix, sealed)

    def put_tokens(self, name: str, entries: Sequence[SavedEntry]) -> None:
        """Writes the tokens that a prefix is of, after its caches."""
        self.put(name, entries, TOKENS)

    def read(self, name: str) -> "Future[list[SavedEntry] | None]":
        """Begins to read a prefix: None where it is not there whole and unchanged."""
        return self._readers.submit(self._read, name, STATE)

    def tokens(self) -> list[tuple[str, list[SavedEntry]]]:
        """Tokens of all prefixes by name, those first that were used longest ago. Blocks."""
        names = self._folder.names(TOKENS)
        found = [(name, self._read(name, TOKENS)) for name in names]
        return [(name, entries) for name, entries in found if entries is not None]

    def erase(self, name: str) -> None:
        """Removes a prefix, soon."""
        self._writer.submit(self._erase, name)

    def settle(self, seconds: float) -> bool:
        """Waits until all is written, for so long at most; whether it is."""
        until = time.monotonic() + seconds
        while self.waiting and time.monotonic() < until:
            time.sleep(0.01)
        return not self.waiting

    def close(self) -> None:
        """Writes what waits to be written. The store is of no use afterwards."""
        self._writer.shutdown()
        self._readers.shutdown()

    def _write(self, name: str, suffix: str, sealed: Sealed) -> None:
        def write() -> None:
            failpoints.reach("prefixes.write")
            if self._folder.size(name, suffix) == sealed.nbytes:
                self._folder.touch(name)
                return
            with (
                self._folder.writing(name, suffix, sealed.nbytes) as descriptor,
                open(descriptor, "wb", buffering=0, closefd=False) as file,
            ):
                sealed.write(file)

        self._guarded(name, write)
        self._guarded(name, self._count)
        with self._lock:
            self._waiting.pop(name + suffix, None)

    def _count(self) -> None:
        self.nbytes = self._folder.nbytes

    def _read(self, name: str, suffix: str) -> list[SavedEntry] | None:
        entries: list[SavedEntry] = []

        def load() -> None:
            failpoints.reach("prefixes.read")
            descriptor = self._folder.open(name, suffix)
            with open(descriptor, "rb", buffering=0) as file:
                entries.extend(read(file, os.fstat(descriptor).st_size, name, self._key))

        if not self._guarded(name, load):
            return None
        if suffix == STATE:
            self._folder.touch(name)
        return entries

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
