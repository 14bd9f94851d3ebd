"""Rolling a cache back by some tokens: by trimming, or from a snapshot where it can't be trimmed.

Caches of full attention can be trimmed at any time, sliding windows until they are full, and
recurrent states never. A snapshot of the last two costs no copy: MLX's arrays are shared until one
is written to, and a step of several tokens makes new ones anyway.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from node.mlx.compat_caches import is_always_trimmable, members, set_members, window


def trimmable_below(kinds: Sequence[Any]) -> float:
    """Tokens below which caches of such kinds can be trimmed; infinite where they always can."""
    return min((_trimmable_below(kind) for kind in kinds), default=math.inf)


def _trimmable_below(kind: Any) -> float:
    if (parts := members(kind)) is not None:
        return trimmable_below(parts)
    if (size := window(kind)) is not None:
        return float(size)
    return math.inf if is_always_trimmable(kind) else 0.0


def snapshot(cache: Sequence[Any]) -> list[Any]:
    """A snapshot of each entry for `restore`; None for those that can be trimmed."""
    return [_snapshot(entry) for entry in cache]


def _snapshot(entry: Any) -> Any:
    if hasattr(entry, "snapshot"):  # on another machine
        return entry.snapshot()
    if (parts := members(entry)) is not None:
        return snapshot(parts)
    return None if is_always_trimmable(entry) else copy.deepcopy(entry)


def restore(cache: list[Any], saved: list[Any], tokens: int) -> None:
    """Rolls back the `tokens` since `saved` was made, in place. `saved` is then used up."""
    for index, before in enumerate(saved):
        cache[index] = _restored(cache[index], before, tokens)


def _restored(entry: Any, before: Any, tokens: int) -> Any:
    if hasattr(entry, "restore"):
        entry.restore(before, tokens)
    elif (parts := members(entry)) is not None:
        restored = list(parts)
        restore(restored, before, tokens)
        set_members(entry, restored)
    elif before is None:
        entry.trim(tokens)
    else:
        return before
    return entry


def trim(cache: Sequence[Any], tokens: int) -> None:
    """Trims the last `tokens` of each entry; the caller has checked that this is possible."""
    for entry in cache:
        if hasattr(entry, "roll_back"):  # on another machine, whose answer nobody needs
            entry.roll_back(tokens)
        else:
            entry.trim(tokens)
