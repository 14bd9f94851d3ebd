"""Prefix cache: KV caches of finished answers, reused for prompts with a common prefix.

mlx-lm's LRUPromptCache would do, but its search copies its way down each cached prompt: 0.27 s
for six of 8000 tokens, on the thread that computes.
"""

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

from node.prefixes.index import common_prefix, covers

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
        return common_prefix(self.tokens, prompt, trimmable=self.trimmable)

    def covers(self, old: "CachedPrefix") -> bool:
        """Whether it is of use wherever an older entry is."""
        return covers(self.tokens, old.tokens, trimmable=self.trimmable)

    def copy_prefix(self, tokens: int) -> list[Any]:
        """Copies the cache of the first `tokens`. May wait for other machines."""
        return trimmed(copy.deepcopy(self.cache), len(self.tokens), tokens)


def trimmed(cache: list[Any], tokens: int, first: int) -> list[Any]:
    """A cache of so many tokens, of which it keeps the first. May wait for other machines."""
    if first < tokens:
        trim_prompt_cache(cache, tokens - first)
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
        self._entries = [
            entry
            for entry in self._entries
            if not covers(new.tokens, entry.tokens, trimmable=new.trimmable)
        ]
        self._entries.append(new)

    def shrink(self, nbytes: int) -> list[CachedPrefix]:
        """Evicts entries until they take at most `nbytes`; returns these."""
        evicted = []
        while self._entries and self.nbytes > nbytes:
            evicted.append(self._entries.pop(0))
        return evicted

    def __iter__(self) -> Iterator[CachedPrefix]:
        """All entries, the least recently used first."""
        return iter(list(self._entries))

    def clear(self) -> None:
        self._entries.clear()
