"""Saved states of mlx-lm's caches, checked before a cache is made of one.

A state comes from a file or another machine. MLX reads and writes by the integers in it, so each
is checked against the shapes of the arrays beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from node.ring.bounds import MOST_TOKENS, FrameError
from node.ring.cache_engine import Extent

# Group sizes and bits that MLX can quantize to.
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)


def cache_from_state(entry: Any, kind: str, state: Any) -> tuple[Any, Extent]:
    """The cache of class `kind` with that state, to stand for `entry`, and its extent.

    `entry` is a cache of the layer, of the same class or of that which it becomes when it is
    batched or quantized. Raises FrameError for anything else.
    """
    if kind not in _kinds(entry):
        raise FrameError(f"a saved {kind[:40]!r} for a {type(entry).__name__}")
    checked = CHECKS.get(kind)
    if checked is None:
        raise FrameError(f"a {kind} can't be stored")
    extent = checked(entry, state)
    if isinstance(entry, CacheList):
        made = CacheList()
        pairs = zip(entry.caches, state, strict=True)
        made.caches = [cache_from_state(member, name, part)[0] for member, (part, name) in pairs]
        return made, extent
    return getattr(mlx_cache, kind).from_state(state), extent


def check_alike(stored: Any, computed: Any) -> None:
    """Raises FrameError where a stored cache has other arrays than a computed one of its layer.

    The two may differ in rows and tokens alone.
    """
    if isinstance(stored, CacheList):
        for member, other in zip(stored.caches, computed.caches, strict=True):
            check_alike(member, other)
    elif isinstance(stored, ArraysCache):
        pairs = zip(stored.cache, computed.cache, strict=True)
        for ours, theirs in pairs:
            if ours is not None and theirs is not None:
                _check_same(ours.shape[1:], theirs.shape[1:], ours.dtype, theirs.dtype)
    elif stored.keys is not None:
        for name in ("keys", "values"):
            ours, theirs = getattr(stored, name), getattr(computed, name)
            shape, dtype = _heads(ours, stored)
            _check_same(shape, (theirs.shape[1], theirs.shape[3]), dtype, theirs.dtype)


def _heads(array: Any, stored: Any) -> tuple[tuple[int, int], mx.Dtype]:
    """((heads, size of a head), dtype) of keys or values, quantized or not."""
    if isinstance(stored, QuantizedKVCache):
        packed, scales = array[:2]
        return (packed.shape[1], packed.shape[3] * 32 // stored.bits), scales.dtype
    return (array.shape[1], array.shape[3]), array.dtype


def _check_same(ours: Any, theirs: Any, dtype: mx.Dtype, other: mx.Dtype) -> None:
    if tuple(ours) != tuple(theirs) or dtype != other:
        raise FrameError(f"stored arrays of {dtype} {tuple(ours)}, not {other} {tuple(theirs)}")


def _kinds(entry: Any) -> set[str]:
    name = type(entry).__name__
    batched = {"KVCache": "BatchKVCache", "RotatingKVCache": "BatchRotatingKVCache"}
    kinds = {name, batched.get(name, name)}
    return kinds | {"QuantizedKVCache"} if hasattr(entry, "to_quantized") else kinds


def _kv(entry: Any, state: Any) -> Extent:
    keys, values, offset = _parts(state, 3)
    length, rows = _arrays(keys, values)
    return Extent(rows, _integer("offset", offset, length))


def _quantized(entry: Any, state: Any) -> Extent:
    keys, values, offset, group_size, bits = _parts(state, 5)
    if keys is None and values is None:
        return Extent(None, _integer("offset", offset, 0))
    _integer("group size", group_size, max(GROUP_SIZES))
    _integer("bits", bits, max(BITS))
    if group_size not in GROUP_SIZES or bits not in BITS:
        raise FrameError(f"{bits} bits in groups of {group_size}")
    shapes = set()
    for name, parts in (("keys", keys), ("values", values)):
        packed, scales, biases = _parts(parts, 3)
        for array in (packed, scales, biases):
            _array(name, array, 4)
        size = packed.shape[3] * 32 // bits
        same = packed.shape[:3] == scales.shape[:3] and scales.shape == biases.shape
        if not (same and packed.dtype == mx.uint32 and size == scales.shape[3] * group_size):
            raise FrameError(f"quantized {name} whose scales don't fit")
        if not (_is_float(scales) and scales.dtype == biases.dtype):
            raise FrameError(f"quantized {name} with scales of {scales.dtype}")
        shapes.add(packed.shape[:3])
    if len(shapes) > 1:
        raise FrameError("keys and values of different lengths")
    return Extent(packed.shape[0], _integer("offset", offset, packed.shape[2]))


def _rotating(entry: Any, state: Any) -> Extent:
    keys, values, offset, keep, most, index = _parts(state, 6)
    length, rows = _arrays(keys, values)
    _equal("window", most, entry.max_size)
    _equal("kept tokens", keep, entry.keep)
    _integer("index", index, length)
    return Extent(rows, _integer("offset", offset, MOST_TOKENS if length else 0))


def _chunked(entry: Any, state: Any) -> Extent:
    keys, values, offset, size, start = _parts(state, 5)
    length, rows = _arrays(keys, values)
    _equal("chunk", size, entry.chunk_size)
    _integer("start", start, MOST_TOKENS)
    _integer("offset", offset, start + length, least=start)
    return Extent(rows, offset)


def _batch(entry: Any, state: Any) -> Extent:
    keys, values, offset, padding, index = _parts(state, 5)
    length, rows = _arrays(keys, values)
    _integer("index", index, length)
    return Extent(_row_numbers(rows, offset, padding), index)


def _batch_rotating(entry: Any, state: Any) -> Extent:
    keys, values, offset, padding, most, end, index, rotated = _parts(state, 8)
    length, rows = _arrays(keys, values)
    _equal("window", most, entry.max_size)
    _integer("index", index, length)
    _integer("offset", end, MOST_TOKENS if length else 0)
    if not isinstance(rotated, bool):
        raise FrameError("a stored mark that is no truth value")
    return Extent(_row_numbers(rows, offset, padding), end)


def _states(entry: Any, state: Any) -> Extent:
    arrays, padding, lengths = _parts(state, 3)
    if not isinstance(arrays, list | tuple) or len(arrays) != len(entry.cache):
        raise FrameError(f"a stored state of other than {len(entry.cache)} arrays")
    present = [array for array in arrays if array is not None]
    for array in present:
        if not isinstance(array, mx.array) or not array.ndim or not array.size:
            raise FrameError("a stored state that is no array of rows")
    rows = {array.shape[0] for array in present}
    for numbers in (padding, lengths):
        if numbers is not None:
            _row(numbers)
            rows.add(numbers.shape[0])
    if len(rows) > 1:
        raise FrameError(f"stored arrays of {sorted(rows)} rows")
    return Extent(next(iter(rows), None), 0)


def _list(entry: Any, state: Any) -> Extent:
    members = entry.caches
    pairs = [_parts(pair, 2) for pair in _parts(state, len(members))]
    extents = []
    for member, (part, name) in zip(members, pairs, strict=True):
        if not isinstance(name, str):
            raise FrameError("a stored member without a class")
        extents.append(cache_from_state(member, name, part)[1])
    rows = {extent.rows for extent in extents if extent.rows is not None}
    if len(rows) > 1:
        raise FrameError(f"stored members of {sorted(rows)} rows")
    return Extent(next(iter(rows), None), max((extent.tokens for extent in extents), default=0))


CHECKS: dict[str, Callable[[Any, Any], Extent]] = {
    KVCache.__name__: _kv,
    QuantizedKVCache.__name__: _quantized,
    RotatingKVCache.__name__: _rotating,
    ChunkedKVCache.__name__: _chunked,
    BatchKVCache.__name__: _batch,
    BatchRotatingKVCache.__name__: _batch_rotating,
    ArraysCache.__name__: _states,
    CacheList.__name__: _list,
}


def _parts(state: Any, count: int) -> Sequence[Any]:
    if not isinstance(state, list | tuple) or len(state) != count:
        raise FrameError(f"a stored state of other than {count} parts")
    return state


def _arrays(keys: Any, values: Any) -> tuple[int, int | None]:
    """(length, rows) of keys and values; (0, None) where there are none."""
    if keys is None and values is None:
        return 0, None
    _array("keys", keys, 4)
    _array("values", values, 4)
    if keys.shape[:3] != values.shape[:3]:
        raise FrameError(f"keys of {keys.shape} and values of {values.shape}")
    if not (_is_float(keys) or keys.dtype == mx.uint8) or keys.dtype != values.dtype:
        raise FrameError(f"keys of {keys.dtype} and values of {values.dtype}")
    return keys.shape[2], keys.shape[0]


def _array(name: str, value: Any, dimensions: int) -> None:
    if not isinstance(value, mx.array) or value.ndim != dimensions or not value.shape[0]:
        raise FrameError(f"stored {name} that are no array of {dimensions} dimensions")


def _row(numbers: Any) -> None:
    if not isinstance(numbers, mx.array) or numbers.ndim != 1 or not numbers.size:
        raise FrameError("stored numbers that are not one a row")
    if not mx.issubdtype(numbers.dtype, mx.signedinteger):
        raise FrameError(f"stored numbers of {numbers.dtype}")
    most: Any = mx.abs(numbers).max().item()
    if most > MOST_TOKENS:
        raise FrameError(f"stored numbers beyond {MOST_TOKENS}")


def _row_numbers(rows: int | None, *numbers: Any) -> int:
    for each in numbers:
        _row(each)
    counts = {each.shape[0] for each in numbers} | ({rows} if rows is not None else set())
    if len(counts) != 1:
        raise FrameError(f"stored numbers and arrays of {sorted(counts)} rows")
    return counts.pop()


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _integer(name: str, value: Any, most: int, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise FrameError(f"a stored {name} that is not within {least}-{most}")
    return value


def _equal(name: str, value: Any, wanted: int) -> None:
    if value != wanted:
        raise FrameError(f"a stored {name} other than {wanted}")
