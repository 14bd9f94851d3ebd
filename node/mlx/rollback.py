"""Rolling a cache back by some tokens: by trimming, or from a snapshot where it can't be trimmed.

Caches of full attention can be trimmed at any time, sliding windows until they are full, and
recurrent states never. A snapshot of the last two costs no copy where a step of several tokens
makes new arrays anyway: MLX's arrays are shared until one is written to. Where each step is of one
token, which is written into the array of a full window, the snapshot is what that overwrites.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from node.mlx.compat_caches import (
    is_always_trimmable,
    leaves,
    members,
    next_overwritten,
    set_members,
    window,
)


class Overwritten:
    """Keys and values (1, heads, 1, size) that the next token of a full window overwrites."""

    def __init__(self, cache: Any, place: int) -> None:
        self._place = place
        self._offset, self._index = cache.offset, cache._idx
        at = slice(place, place + 1)
        # Evaluated at once: else they would hold the whole window, and each write would copy it.
        self._keys = mx.contiguous(cache.keys[..., at, :])
        self._values = mx.contiguous(cache.values[..., at, :])
        mx.eval(self._keys, self._values)

    def put_back(self, cache: Any) -> None:
        at = slice(self._place, self._place + 1)
        cache.keys[..., at, :] = self._keys
        cache.values[..., at, :] = self._values
        cache.offset, cache._idx = self._offset, self._index


def trimmable_below(kinds: Sequence[Any]) -> float:
    """Tokens below which caches of such kinds can be trimmed; infinite where they always can."""
    return min((_trimmable_below(kind) for kind in kinds), default=math.inf)


def _trimmable_below(kind: Any) -> float:
    if (parts := members(kind)) is not None:
        return trimmable_below(parts)
    if (size := window(kind)) is not None:
        return float(size)
    return math.inf if is_always_trimmable(kind) else 0.0


def windows_fill_at(kinds: Sequence[Any]) -> float:
    """Tokens from which on all windows are full; infinite where a cache is of another sort that
    can't be trimmed, whose snapshots are copies.
    """
    sizes = [
        0 if is_always_trimmable(kind) else math.inf if (size := window(kind)) is None else size
        for kind in leaves(kinds)
    ]
    return max(sizes, default=0)


def snapshot(cache: Sequence[Any], *, single: bool = False) -> list[Any]:
    """A snapshot of each entry for `restore`; None for those that can be trimmed.

    single: all steps until then are of one token.
    """
    return [_snapshot(entry, single=single) for entry in cache]


def _snapshot(entry: Any, *, single: bool) -> Any:
    if hasattr(entry, "snapshot"):  # on another machine
        return entry.snapshot(single=single)
    if (parts := members(entry)) is not None:
        return snapshot(parts, single=single)
    if is_always_trimmable(entry):
        return None
    place = next_overwritten(entry) if single else None
    return copy.deepcopy(entry) if place is None else Overwritten(entry, place)


def restore(
    cache: list[Any], saved: list[Any], tokens: int, later: Sequence[list[Any]] = ()
) -> None:
    """Rolls back the `tokens` since `saved` was made, in place.

    later: the snapshots that were made since, in order; they are needed where these are `single`.
    All are then used up.
    """
    for index, before in enumerate(saved):
        since = [each[index] for each in later]
        cache[index] = _restored(cache[index], before, tokens, since)


def _restored(entry: Any, before: Any, tokens: int, later: list[Any]) -> Any:
    if hasattr(entry, "restore"):
        entry.restore(before, tokens, later)
    elif (parts := members(entry)) is not None:
        restored = list(parts)
        restore(restored, before, tokens, later)
        set_members(entry, restored)
    elif before is None:
        entry.trim(tokens)
    else:
        for each in reversed([before, *later]):
            if isinstance(each, Overwritten):
                each.put_back(entry)
            else:
                entry = each
    return entry


def trim(cache: Sequence[Any], tokens: int) -> None:
    """Trims the last `tokens` of each entry; the caller has checked that this is possible."""
    for entry in cache:
        if hasattr(entry, "roll_back"):  # on another machine, whose answer nobody needs
            entry.roll_back(tokens)
        else:
            entry.trim(tokens)
