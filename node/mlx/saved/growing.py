"""Which arrays of saved caches grow by one place a token."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

from node.prefixes.saved import SavedArray, SavedLeaves

TOKEN_AXIS = 2  # of keys and values, (rows, heads, tokens, size of a head)


def by_tokens(cache: Any, leaves: SavedLeaves) -> SavedLeaves:
    """The leaves of a cache's state, those that grow marked, and without the places that are
    allocated for tokens to come. Of one row.
    """
    growing = dict(_growing(cache, ""))

    def marked(key: str, leaf: SavedArray | str) -> SavedArray | str:
        offsets = (n for at, n in growing.items() if key == at or key.startswith(f"{at}."))
        offset = next(offsets, None)
        if offset is None or not isinstance(leaf, SavedArray):
            return leaf
        return replace(leaf, values=leaf.values[:, :, :offset], axis=TOKEN_AXIS)

    return tuple((key, marked(key, leaf)) for key, leaf in leaves)


def _growing(cache: Any, at: str) -> Iterator[tuple[str, int]]:
    """Where keys and values are in a flattened state, each with its tokens.

    Windows and chunks forget tokens, and states of recurrent layers have none.
    """
    if type(cache) in (KVCache, QuantizedKVCache):
        for index in range(2):
            yield f"{at}{index}", cache.offset
    elif isinstance(cache, CacheList):
        for index, member in enumerate(cache.caches):
            yield from _growing(member, f"{at}{index}.0.")
