"""Prefixes of one session that are being read from the machine's disk."""

import logging
from concurrent.futures import Future
from typing import Generic

from node.prefixes.blocks import NAME_BYTES
from node.prefixes.saved import SavedEntry
from node.ring.bounds import MOST_ARRIVING, FrameError
from node.ring.cache_engine import C, CacheEngine, Extent
from unicluster.errors import UniclusterError
from unicluster.v1.stage_pb2 import MISSING, READING, THERE, Recalled

log = logging.getLogger(__name__)


class Recalls(Generic[C]):
    """Files that are being read or were read, by name, until a cache is made of each.

    On the compute thread. A file that can't be used is missing, and no error.
    """

    def __init__(self, engine: CacheEngine[C]) -> None:
        self._engine = engine
        self._read: dict[str, Future[list[SavedEntry] | None]] = {}

    def read(self, name: bytes) -> "Recalled.ValueType":
        """Begins to read, or says how far it is. Raises FrameError where too many are read."""
        store, key = self._engine.prefixes, prefix_name(name)
        if store is None:
            return MISSING
        reading = self._read.get(key)
        if reading is None:
            if len(self._read) >= MOST_ARRIVING:
                raise FrameError(f"more than {MOST_ARRIVING} prefixes at once")
            reading = self._read[key] = store.read(key)
        if not reading.done():
            return READING
        return MISSING if reading.result() is None else THERE

    def make(self, name: bytes) -> tuple[C, Extent] | None:
        """A cache of a file that was read, and its extent; None where that can't be."""
        key = prefix_name(name)
        reading = self._read.pop(key, None)
        entries = reading.result() if reading is not None and reading.done() else None
        if entries is None:
            return None
        try:
            cache, extent = self._engine.revive(entries)
        except FrameError as error:
            log.warning("prefix %s on disk does not fit, and is removed: %s", key, error)
            self._erase(key)
        except UniclusterError as error:
            log.info("prefix %s on disk is not used: %s", key, error)
        else:
            if extent.rows in (None, 1) and extent.tokens <= self._engine.most_tokens:
                return cache, extent
            log.warning("prefix %s on disk is of another size, and is removed", key)
            self._engine.free(cache)
            self._erase(key)
        return None

    def drop(self, name: bytes) -> None:
        """Forgets what was read."""
        self._read.pop(prefix_name(name), None)

    def erase(self, name: bytes) -> None:
        """Removes a file."""
        self.drop(name)
        self._erase(prefix_name(name))

    def clear(self) -> None:
        self._read.clear()

    def _erase(self, name: str) -> None:
        if self._engine.prefixes is not None:
            self._engine.prefixes.erase(name)


def prefix_name(name: bytes) -> str:
    """The name of a prefix's file. Raises FrameError unless it is one."""
    if len(name) != NAME_BYTES:
        raise FrameError(f"a prefix's name of {len(name)} bytes, not {NAME_BYTES}")
    return name.hex()
