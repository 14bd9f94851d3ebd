"""Prefix cache: KV caches of finished answers, reused for prompts with a common prefix.

mlx-lm's LRUPromptCache would do, but its search copies its way down each cached prompt: 0.27 s
for six of 8000 tokens, on the thread that computes.
"""

import copy
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

from node.prefixes.index import common_prefix, covers

# Copying a cache for fewer tokens costs more than it saves.
MIN_TOKENS = 16
# Checkpoints of a prompt, at most, and the tokens between those of one without marks.
CHECKPOINTS = 3
CHECKPOINT_STEP = 256
# Tokens from one mark to the next, at most, of what a template writes between messages.
GAP = 5


def mark_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens of mlx-lm's `tokenizer` that templates write between messages."""
    if hasattr(tokenizer, "mark_ids"):  # that of a GGUF
        return frozenset(tokenizer.mark_ids())
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    # Some have runs of spaces among them.
    return frozenset(number for number, token in added.items() if token.content.strip())


def branchings(prompt: Tokens[int], marks: Collection[int]) -> list[int]:
    """Numbers of a prompt's first tokens that another prompt probably has in common with it.

    A chat goes on, is asked anew, or has a message edited: so prompts part near where a message
    begins or ends, and `marks` are there, with a few other tokens (a role, a line's end) between
    them. Of each such group the first counts, and of those the last ones.
    """
    places = [place for place, token in enumerate(prompt) if token in marks]
    groups = [b for a, b in pairwise([-GAP - 1, *places]) if b - a > GAP and b >= MIN_TOKENS]
    if not groups:
        groups = list(range(CHECKPOINT_STEP, len(prompt), CHECKPOINT_STEP))
    return groups[-CHECKPOINTS:]


@dataclass(eq=False)
class CachedPrefix:
    """A cache of `tokens`; `nbytes` on all stages. `trimmable`: any prefix of it can be used.

    measured: `nbytes` is what the stages report, and no estimate.
    """

    tokens: "np.ndarray[Any, Any]"
    cache: list[Any]
    nbytes: int
    trimmable: bool
    measured: bool = False

    def common_prefix(self, prompt: "np.ndarray[Any, Any]") -> int:
        """Reusable tokens of a prompt, whose last token must always be computed."""
        return common_prefix(self.tokens, prompt, trimmable=self.trimmable)

    def covers(self, old: "CachedPrefix") -> bool:
        """Whether it is of use wherever an older entry is."""
        return covers(self.tokens, old.tokens, trimmable=self.trimmable)

    def copy_prefix(self, tokens: int) -> list[Any]:
        """Copies the cache of the first `tokens`. May wait for other machines."""
        return trimmed(copy.deepcopy(self.cache), len(self.tokens), tokens)

    def take_prefix(self, tokens: int) -> list[Any]:
        """The cache itself, trimmed to the first `tokens`: the entry is used up."""
        cache, self.cache = self.cache, []
        return trimmed(cache, len(self.tokens), tokens)


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

    def __contains__(self, entry: CachedPrefix) -> bool:
        return entry in self._entries

    def find(self, prompt: Tokens[int], *, once: bool = False) -> tuple[CachedPrefix, int] | None:
        """The entry with the longest common prefix of a prompt, and its length in tokens.

        once: it is evicted first from now on, as that of an answer that goes on: its cache will be
        where the answer's is. The entries of others that are to go on then stay.
        """
        asked = np.array(prompt)
        candidates = [(entry.common_prefix(asked), entry) for entry in self._entries]
        saved, best = max(candidates, key=lambda pair: pair[0], default=(0, None))
        if best is None or saved < MIN_TOKENS:
            return None
        self._entries.remove(best)
        self._entries.insert(0 if once else len(self._entries), best)
        return best, saved

    def add(self, new: CachedPrefix, *, newest: bool = True) -> None:
        """Adds an entry and removes those that it covers; else as the one last used but one."""
        self._entries = [
            entry
            for entry in self._entries
            if not covers(new.tokens, entry.tokens, trimmable=new.trimmable)
        ]
        self._entries.insert(len(self._entries) - (not newest and bool(self._entries)), new)

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
