"""Undocumented layout of mlx-lm's KV caches that the code relies on.

mlx-lm documents no cache class. What of the cache protocol (`update_and_fetch`, `merge`, `trim`,
`state`, ...) is called elsewhere by those names; what looks inside a cache, or asks of which class
it is, is here, a function a piece, each with a contract test (tests/unit/test_compat.py). The
layout of saved states: saved/state.py.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from node.mlx.compat import override, separate
from node.mlx.tree import is_object

Caches = list[Any]

# Tokens by which a KV cache's arrays grow at a time.
GROWTH_TOKENS = int(KVCache.step)
# A cache saved by mlx-lm goes by its class's name. Under this one come members with names and
# states of their own.
SAVED_LIST = CacheList.__name__


# --- which kind of cache


def members(cache: Any) -> tuple[Any, ...] | None:
    """The caches that one layer has several of, or None for a single cache."""
    return tuple(cache.caches) if isinstance(cache, CacheList) else None


def set_members(cache: Any, caches: Sequence[Any]) -> None:
    """Replaces the members of a cache that has some."""
    cache.caches = tuple(caches)


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """All single caches, those within lists of caches included."""
    for cache in caches:
        parts = members(cache)
        yield from (cache,) if parts is None else leaves(parts)


def is_recurrent(cache: Any) -> bool:
    """Whether it is a recurrent layer's state, whose size does not depend on the tokens."""
    return isinstance(cache, ArraysCache)


def window(cache: Any) -> int | None:
    """Tokens that a cache with a sliding window keeps; None for one without."""
    return int(cache.max_size) if isinstance(cache, RotatingKVCache) else None


def next_overwritten(cache: Any) -> int | None:
    """Place in a full window that the next token alone overwrites; None where it does not.

    It does not while the window grows, and where it has more tokens than the window: then the next
    one has new arrays made.
    """
    if type(cache) is not RotatingKVCache or cache.keys is None:
        return None
    if cache.offset < cache.max_size or cache.keys.shape[2] != cache.max_size:
        return None
    return int(cache.keep if cache._idx == cache.max_size else cache._idx)


def is_always_trimmable(cache: Any) -> bool:
    """Whether any number of tokens can be trimmed at any time, and in place."""
    return isinstance(cache, KVCache | QuantizedKVCache)


def grows_with_tokens(cache: Any) -> bool:
    """Whether its size is in proportion to its tokens, rounded up to GROWTH_TOKENS."""
    return type(cache) is KVCache


def interchangeable_kind(cache: Any) -> tuple[Any, ...]:
    """Equal for fresh caches that give equal masks and offsets for the same tokens."""
    if (parts := members(cache)) is not None:
        return (CacheList, *map(interchangeable_kind, parts))
    if is_recurrent(cache):
        return (type(cache), len(cache.cache))
    plain = {k: v for k, v in vars(cache).items() if isinstance(v, int | float | str)}
    return (type(cache), *sorted(plain.items()))


def growing_cache() -> Any:
    """An empty cache that grows with its tokens and can be trimmed and merged."""
    return KVCache()


def recurrent_cache() -> Any:
    """An empty state of a recurrent layer, which can be merged but not trimmed."""
    return ArraysCache(2)


def can_merge(cache: Any) -> bool:
    """Whether several of its kind can become one batch."""
    return hasattr(cache, "merge")


# --- what is in a cache


def token_count(cache: Any) -> int:
    """Tokens in a cache as far as it counts them: recurrent states say 0."""
    # The `size` of quantized caches is 0, and a model's own class need not have one.
    has_size = hasattr(cache, "size") and not isinstance(cache, QuantizedKVCache)
    return int(cache.size() if has_size else cache.offset)


def head_sizes(cache: Any) -> list[int]:
    """The last axis of a KV cache's keys and values; empty where it has none yet."""
    arrays = [getattr(cache, name, None) for name in ("keys", "values")]
    return [array.shape[-1] for array in arrays if isinstance(array, mx.array)]


def add_empty_tokens(cache: Any, tokens: int) -> None:
    """Zeros for `tokens` more, lazily, in a KV cache that has some tokens; others stay as they are.

    keys and values are (batch, heads, tokens, head size).
    """
    if not head_sizes(cache):
        return
    like = cache.keys, cache.values
    cache.update_and_fetch(*(mx.zeros((*a.shape[:2], tokens, a.shape[3]), a.dtype) for a in like))


def replace_update(cache: Any, update: Callable[..., Any]) -> None:
    """Makes one cache call `update(keys, values)` for what a layer writes to it."""
    cache.update_and_fetch = update


def restore_update(cache: Any) -> None:
    """Undoes `replace_update`."""
    del cache.update_and_fetch


# --- caches that count tokens and keep nothing


def make_counter(cache: Any) -> None:
    """Makes a fresh cache fit for `count_tokens`: it is never quantized, for it has no heads."""
    if offers_quantized(cache):
        override(cache, to_quantized=lambda self, **_options: self)


def count_tokens(cache: Any, batch: int, tokens: int) -> None:
    """Moves a cache's masks and offsets on by `tokens`, at one byte a token, lazily."""
    if (parts := members(cache)) is not None:
        for part in parts:
            count_tokens(part, batch, tokens)
    elif is_recurrent(cache):
        cache.cache = [mx.zeros((batch, 1), mx.uint8) for _ in cache.cache]
        cache.advance(tokens)
    else:
        nothing = mx.zeros((batch, 1, tokens, 1), mx.uint8)
        cache.update_and_fetch(nothing, nothing)


# --- quantized caches


def offers_quantized(cache: Any) -> bool:
    """Whether it can be asked for a quantized form; those with a window refuse then."""
    return hasattr(cache, "to_quantized")


def quantized(cache: Any, bits: int, group_size: int) -> Any:
    """A cache of 4 or 8 bits of the same contents; itself where there is no such form.

    Raises NotImplementedError for a sliding window.
    """
    if not offers_quantized(cache):
        return cache
    return cache.to_quantized(group_size=group_size, bits=bits)


# --- shadow caches


def shadow(caches: Sequence[Any]) -> Caches:
    """Shadow caches: they share their arrays until a step writes to them, then diverge."""
    seen: dict[int, mx.array] = {}
    return [_shadow(cache, seen) for cache in caches]


def commit(caches: Sequence[Any], shadows: Sequence[Any]) -> None:
    """Puts the state of the shadows into the caches; the shadows are then used up."""
    for cache, other in zip(caches, shadows, strict=True):
        cache.__dict__ = other.__dict__


def _shadow(value: Any, seen: dict[int, mx.array]) -> Any:
    # mlx-lm writes into a cache's array in place, which shows in the same Python object.
    if isinstance(value, mx.array):
        if id(value) not in seen:
            seen[id(value)] = separate(value)
        return seen[id(value)]
    if value is None or isinstance(value, int | float | str):
        return value
    if type(value) in (list, tuple):
        return type(value)(_shadow(part, seen) for part in value)
    if type(value) is dict:
        return {key: _shadow(part, seen) for key, part in value.items()}
    if is_object(value):
        new = object.__new__(type(value))
        vars(new).update({name: _shadow(part, seen) for name, part in vars(value).items()})
        return new
    return copy.deepcopy(value)


# --- saved caches


class DeferredState:
    """A cache's state that is fetched when mlx-lm saves it, and not when MLX evaluates it.

    Python's tree functions take it for a list, by its `__class__`; mx.eval, by its type, for a
    leaf that is no array.
    """

    __class__ = property(lambda self: list)

    def __init__(self, fetch: Any) -> None:
        """`fetch()` returns a list of (state, class name), which is asked for at most once."""
        self._fetch = fetch
        self._fetched: list[tuple[Any, str]] | None = None

    def _all(self) -> list[tuple[Any, str]]:
        if self._fetched is None:
            self._fetched = self._fetch()
        return self._fetched

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, index: int) -> tuple[Any, str]:
        return self._all()[index]
