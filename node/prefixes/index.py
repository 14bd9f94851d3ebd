"""The head's index of the prefixes on disk: which tokens each is of."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from node.prefixes.blocks import NAME_BYTES, block_names
from node.prefixes.saved import Array, SavedArray, SavedEntry
from node.prefixes.store import PrefixStore

# Reading a file for fewer tokens costs more than it saves.
MIN_TOKENS = 64
KIND = "tokens"


def common_prefix(cached: Array, prompt: Array, *, trimmable: bool) -> int:
    """Tokens of a cache of `cached` that a prompt can use, whose last token must be computed.

    trimmable: any prefix of the cache can be used, else only the whole.
    """
    limit = min(len(cached), len(prompt) - 1)
    different = np.flatnonzero(cached[:limit] != prompt[:limit])
    common = int(different[0]) if len(different) else limit
    return common if trimmable or common == len(cached) else 0


def covers(new: Array, old: Array, *, trimmable: bool) -> bool:
    """Whether a cache of `new` is of use wherever one of `old` is."""
    reusable = trimmable or len(new) == len(old)
    return reusable and np.array_equal(new[: len(old)], old)


@dataclass(frozen=True, eq=False)
class DiskPrefix:
    """Caches of `tokens` in files called `name`."""

    name: bytes
    tokens: Array
    trimmable: bool


class PrefixIndex:
    """Prefixes on disk, of rings of the same cuts; those used last are last. For one thread."""

    def __init__(self, store: PrefixStore) -> None:
        """Reads the tokens of all prefixes of the store; blocks."""
        self.store = store
        self._prefixes: dict[bytes, DiskPrefix] = {}
        self._rings: dict[bytes, str] = {}
        for name, entries in store.tokens():
            self._note(name, entries)

    def name_of(self, tokens: Array, ring: str) -> bytes:
        """The name of the files of `tokens` on all stages of a ring."""
        data = ring.encode() + b"\0" + tokens.astype("<u4").tobytes()
        return hashlib.blake2b(data, digest_size=NAME_BYTES).digest()

    def blocks_of(self, tokens: Array, ring: str) -> list[bytes]:
        """Names of the blocks that these files begin with, on all stages of a ring."""
        return block_names(tokens, ring)

    def find(self, prompt: Array, ring: str, more_than: int) -> tuple[DiskPrefix, int] | None:
        """The prefix with most tokens in common with a prompt, and their number, if it is
        MIN_TOKENS or more larger than `more_than`.
        """
        found = [
            (common_prefix(prefix.tokens, prompt, trimmable=prefix.trimmable), prefix)
            for prefix in self._of(ring)
        ]
        common, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or common < more_than + MIN_TOKENS:
            return None
        self._prefixes[best.name] = self._prefixes.pop(best.name)
        return best, common

    def __contains__(self, name: bytes) -> bool:
        return name in self._prefixes

    def keep_whole(self, prefix: DiskPrefix) -> None:
        """Takes a prefix for one that is of use only as a whole."""
        if prefix.name in self._prefixes:
            self._prefixes[prefix.name] = replace(prefix, trimmable=False)

    def add(
        self, tokens: Array, ring: str, *, trimmable: bool, idle: bool = False
    ) -> list[DiskPrefix]:
        """Notes a prefix that is being written, and writes which tokens it is of.

        idle: while the machine does nothing else. Returns those that it covers, which are no longer
        of use.
        """
        new = DiskPrefix(self.name_of(tokens, ring), tokens, trimmable)
        covered = [p for p in self._of(ring) if covers(tokens, p.tokens, trimmable=trimmable)]
        for prefix in covered:
            self.remove(prefix)
        self._prefixes[new.name] = new
        self._rings[new.name] = ring
        leaves = (
            ("tokens", SavedArray("uint32", tokens.astype("<u4"))),
            ("ring", json.dumps(ring)),
            ("trimmable", json.dumps(trimmable)),
        )
        self.store.put_tokens(new.name.hex(), [SavedEntry(KIND, leaves)], idle=idle)
        return [prefix for prefix in covered if prefix.name != new.name]

    def remove(self, prefix: DiskPrefix) -> None:
        """Forgets a prefix; its files are another matter."""
        self._prefixes.pop(prefix.name, None)
        self._rings.pop(prefix.name, None)

    def _of(self, ring: str) -> Iterable[DiskPrefix]:
        return [p for p in self._prefixes.values() if self._rings[p.name] == ring]

    def _note(self, name: str, entries: list[SavedEntry]) -> None:
        leaves = dict(entries[0].leaves) if len(entries) == 1 else {}
        tokens, ring = leaves.get("tokens"), leaves.get("ring")
        if not isinstance(tokens, SavedArray) or not isinstance(ring, str):
            return
        ring = json.loads(ring)
        prefix = DiskPrefix(
            self.name_of(tokens.values, ring),
            tokens.values.astype(np.int64),
            leaves.get("trimmable") == "true",
        )
        if prefix.name.hex() == name:
            self._prefixes[prefix.name] = prefix
            self._rings[prefix.name] = ring
