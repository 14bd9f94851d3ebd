"""Prefix cache: KV caches of finished answers, reused for prompts with a common prefix.

mlx-lm's LRUPromptCache would do, but its search copies its way down each cached prompt: 0.27 s
for six of 8000 tokens, on the thread that computes.
"""

import copy
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

# Copying a cache for fewer tokens costs more than it saves.
MIN_TOKENS = 16


@dataclass(eq=False)
class CachedPrefix:
    """A cache of `tokens`; `nbytes` on all stages. `trimmable`: any prefix of it can be used."""

    tokens: "np.ndarray[Any, Any]"
    cache: list[Any]
    nbytes: int
    trimmable: bool

    def common_prefix(self, prompt: "np.ndarray[Any, Any]") -> int:
        """Reusable tokens of a prompt, whose last token must always be computed."""
        limit = min(len(self.tokens), len(prompt) - 1)
        different = np.flatnonzero(self.tokens[:limit] != prompt[:limit])
        common = int(different[0]) if len(different) else limit
        return common if self.trimmable or common == len(self.tokens) else 0

    def copy_prefix(self, tokens: int) -> list[Any]:
        """Copies the cache of the first `tokens`. May wait for other machines."""
        cache = copy.deepcopy(self.cache)
        if tokens < len(self.tokens):
            trim_prompt_cache(cache, len(self.tokens) - tokens)
        return cache


class PrefixCache:
    """Cached prefixes; the least recently used are evicted first."""

    def __init__(self) -> None:
        self._entries: list[CachedPrefix] = []  # the last used is last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    def find(self, prompt: Tokens[int]) -> tuple[CachedPrefix, int] | None:
        """The entry with the longest common prefix of a prompt, and its length in tokens."""
        asked = np.array(prompt)
        candidates = [(entry.common_prefix(asked), entry) for entry in self._entries]
        saved, best = max(candidates, key=lambda pair: pair[0], default=(0, None))
        if best is None or saved < MIN_TOKENS:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best, saved

    def add(self, new: CachedPrefix) -> None:
        """Adds an entry and removes those that it covers."""
        self._entries = [entry for entry in self._entries if not _covers(new, entry)]
        self._entries.append(new)

    def shrink(self, nbytes: int) -> None:
        """Evicts entries until they take at most `nbytes`."""
        while self._entries and self.nbytes > nbytes:
            del self._entries[0]

    def clear(self) -> None:
        self._entries.clear()


def _covers(new: CachedPrefix, old: CachedPrefix) -> bool:
    count = len(old.tokens)
    reusable = new.trimmable or len(new.tokens) == count
    return reusable and np.array_equal(new.tokens[:count], old.tokens)
