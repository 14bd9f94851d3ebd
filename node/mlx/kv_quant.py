"""KV caches of 4 or 8 bits, as mlx-lm quantizes them: after the first tokens are in them.

Only caches of attention over everything can be; states and the like stay as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, RotatingKVCache

# mlx-lm's own, and what is taken where a head's size is no multiple of it.
GROUP_SIZE = 64
SMALLER_GROUP_SIZE = 32


class UnquantizableError(Exception):
    """Says why the caches of a model can't be quantized; the model's name goes before it."""


def quantize(cache: list[Any], bits: int) -> None:
    """Quantizes in place what isn't yet; for 0 bits nothing. Entries may be other machines'."""
    if bits:
        cache[:] = quantized(cache, bits)


def quantized(cache: Sequence[Any], bits: int, group_size: int = GROUP_SIZE) -> list[Any]:
    """The same caches, those quantized that can be."""
    return [
        entry.to_quantized(group_size=_group_size(entry, group_size), bits=bits)
        if hasattr(entry, "to_quantized")
        else entry
        for entry in cache
    ]


def check_quantizable(cache: Sequence[Any]) -> None:
    """Raises UnquantizableError for caches that mlx-lm can't quantize."""
    if any(isinstance(member, RotatingKVCache) for member in _members(cache)):
        raise UnquantizableError("has sliding windows, which mlx-lm can't quantize")
    if not any(hasattr(entry, "to_quantized") for entry in cache):
        raise UnquantizableError("has no KV caches that mlx-lm can quantize")


def _members(cache: Sequence[Any]) -> Iterator[Any]:
    for entry in cache:
        yield from _members(entry.caches) if isinstance(entry, CacheList) else (entry,)


def _group_size(entry: Any, most: int) -> int:
    arrays = [getattr(entry, name, None) for name in ("keys", "values")]
    odd = any(isinstance(array, mx.array) and array.shape[-1] % most for array in arrays)
    return SMALLER_GROUP_SIZE if odd else most
