"""KV caches of 4 or 8 bits, as mlx-lm quantizes them: after the first tokens are in them.

Only caches of attention over everything can be; states and the like stay as they are.
"""

from collections.abc import Sequence
from typing import Any

from node.mlx import compat_caches as compat

# mlx-lm's own, and what is taken where a head's size is no multiple of it.
GROUP_SIZE = 64
SMALLER_GROUP_SIZE = 32


class UnquantizableError(Exception):
    """The reason why the caches of a model can't be quantized; prefixed with the model's name."""


def quantize(cache: list[Any], bits: int) -> None:
    """Quantizes caches in place, also those on other machines; nothing for 0 bits."""
    if bits:
        cache[:] = quantized(cache, bits)


def quantized(cache: Sequence[Any], bits: int, group_size: int = GROUP_SIZE) -> list[Any]:
    """Caches of equal contents, quantized where that is possible."""
    return [compat.quantized(entry, bits, _group_size(entry, group_size)) for entry in cache]


def check_quantizable(cache: Sequence[Any]) -> None:
    """Raises UnquantizableError for caches that mlx-lm can't quantize."""
    if any(compat.window(entry) is not None for entry in compat.leaves(cache)):
        raise UnquantizableError("has sliding windows, which mlx-lm can't quantize")
    if not any(map(compat.offers_quantized, cache)):
        raise UnquantizableError("has no KV caches that mlx-lm can quantize")


def _group_size(entry: Any, most: int) -> int:
    odd = any(size % most for size in compat.head_sizes(entry))
    return SMALLER_GROUP_SIZE if odd else most
