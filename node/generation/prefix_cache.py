"""Caches of finished answers, kept so that what comes next prefills only what is new.

mlx-lm's LRUPromptCache does the same, but its search copies its way down each kept prompt: 0.27 s
for six of 8000 tokens, on the thread that computes.
"""

import copy
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

# Copying a cache for fewer tokens costs more than it saves.
LEAST_TOKENS = 16


@dataclass(eq=False)
class Kept:
    """`cache` holds `tokens`; `nbytes` on all stages. `trimmable`: a part of it can be used."""

    tokens: "np.ndarray[Any, Any]"
    cache: list[Any]
    nbytes: int
    trimmable: bool

    def shared(self, prompt: "np.ndarray[Any, Any]") -> int:
        """How many tokens of a prompt it saves; the last one must always be computed."""
        most = min(len(self.tokens), len(prompt) - 1)
        different = np.flatnonzero(self.tokens[:most] != prompt[:most])
        common = int(different[0]) if len(different) else most
        return common if self.trimmable or common == len(self.tokens) else 0

    def copied(self, tokens: int) -> list[Any]:
        """A cache of the first `tokens`. May wait for other machines."""
        cache = copy.deepcopy(self.cache)
        if tokens < len(self.tokens):
            trim_prompt_cache(cache, len(self.tokens) - tokens)
        return cache


class KeptCaches:
    """The least recently used go first."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []  # the last used is last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def find(self, prompt: Tokens[int]) -> tuple[Kept, int] | None:
        """What saves the most tokens of a prompt, and how many."""
        asked = np.array(prompt)
        found = [(kept.shared(asked), kept) for kept in self._kept]
        saved, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or saved < LEAST_TOKENS:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return best, saved

    def add(self, new: Kept) -> None:
        """Keeps a cache instead of those that save nothing it doesn't save as well."""
        self._kept = [kept for kept in self._kept if not _covers(new, kept)]
        self._kept.append(new)

    def shrink(self, nbytes: int) -> None:
        """Frees caches until they take at most that much."""
        while self._kept and self.nbytes > nbytes:
            del self._kept[0]

    def clear(self) -> None:
        self._kept.clear()


def _covers(new: Kept, old: Kept) -> bool:
    count = len(old.tokens)
    reusable = new.trimmable or len(new.tokens) == count
    return reusable and np.array_equal(new.tokens[:count], old.tokens)
