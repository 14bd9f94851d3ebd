"""KV caches of 4 or 8 bits, as mlx-lm quantizes them: after the first tokens are in them.

Only caches of attention over everything can be; states and the like stay as they are.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, RotatingKVCache

from unicluster.errors import InputError

BITS = (4, 8)
# mlx-lm's own. Where a head's size is no multiple of it, the next smaller that MLX has.
GROUP_SIZE = 64
GROUP_SIZES = (64, 32)


def quantize(cache: list[Any], bits: int) -> None:
    """Quantizes in place what isn't yet; for 0 bits nothing. Entries may be other machines'."""
    if bits:
        cache[:] = quantized(cache, bits)


def quantized(cache: list[Any], bits: int, group_size: int = GROUP_SIZE) -> list[Any]:
    """The same caches, those that can be quantized so."""
    return [
        entry.to_quantized(group_size=_group_size(entry, group_size), bits=bits)
        if hasattr(entry, "to_quantized")
        else entry
        for entry in cache
    ]


def check_kinds(kinds: list[Any], model_type: str) -> None:
    """Raises InputError for caches that mlx-lm can't quantize."""
    members = list(_members(kinds))
    if any(isinstance(kind, RotatingKVCache) for kind in members):
        raise InputError(f"kv-bits: {model_type} has sliding windows, which can't be quantized")
    if not any(hasattr(kind, "to_quantized") for kind in kinds):
        raise InputError(f"kv-bits: {model_type} has no KV cache that can be quantized")


def _members(kinds: Any) -> Any:
    for kind in kinds:
        yield from _members(kind.caches) if isinstance(kind, CacheList) else (kind,)


def _group_size(entry: Any, most: int) -> int:
    sizes = [
        array.shape[-1]
        for array in (getattr(entry, "keys", None), getattr(entry, "values", None))
        if isinstance(array, mx.array)
    ]
    return next((g for g in GROUP_SIZES if g <= most and not any(s % g for s in sizes)), most)
