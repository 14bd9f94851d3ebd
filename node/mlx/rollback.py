"""Taking back what a cache was run ahead: by cutting it, or from a snapshot where it can't be cut.

Caches of attention over everything can be cut back at any time, windows only until they are
full, and states never. Of the last two a snapshot costs no copy: MLX's arrays are shared until
one is written to, and running ahead by several tokens makes new ones of them anyway.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache


def cuttable_below(kinds: Sequence[Any]) -> float:
    """With fewer tokens than that in them, caches of such kinds can be cut back."""
    return min((_cuttable_below(kind) for kind in kinds), default=math.inf)


def _cuttable_below(kind: Any) -> float:
    if isinstance(kind, CacheList):
        return cuttable_below(kind.caches)
    if isinstance(kind, RotatingKVCache):
        return float(kind.max_size)
    return math.inf if _always_cuttable(kind) else 0.0


def _always_cuttable(cache: Any) -> bool:
    return isinstance(cache, KVCache | QuantizedKVCache)


def snapshot(cache: Sequence[Any]) -> list[Any]:
    """What `restore` needs of each entry; None of those that can be cut back."""
    return [_snapshot(entry) for entry in cache]


def _snapshot(entry: Any) -> Any:
    if hasattr(entry, "snapshot"):  # on another machine
        return entry.snapshot()
    if isinstance(entry, CacheList):
        return snapshot(entry.caches)
    return None if _always_cuttable(entry) else copy.deepcopy(entry)


def restore(cache: list[Any], saved: list[Any], tokens: int) -> None:
    """Takes back the `tokens` since `saved` was made, in place. `saved` is then used up."""
    for index, before in enumerate(saved):
        cache[index] = _restored(cache[index], before, tokens)


def _restored(entry: Any, before: Any, tokens: int) -> Any:
    if hasattr(entry, "restore"):
        entry.restore(before, tokens)
    elif isinstance(entry, CacheList):
        members = list(entry.caches)
        restore(members, before, tokens)
        entry.caches = tuple(members)
    elif before is None:
        entry.trim(tokens)
    else:
        return before
    return entry


def cut(cache: Sequence[Any], tokens: int) -> None:
    """Takes the last `tokens` off; the caller knows that they can be."""
    for entry in cache:
        entry.trim(tokens)
