"""Trees of MLX arrays to and from their wire form: raw bytes with dtype and shape."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from node.mlx.compat import memory, separate
from node.prefixes.saved import SavedArray, SavedLeaves
from node.ring.leaves import check_leaves
from unicluster.v1.tensor_pb2 import Leaf, Tensor

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

# numpy has no bfloat16: its bits travel as uint16.
_NUMPY: dict[str, Any] = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "float32": np.float32,
    "bfloat16": np.uint16,
    "complex64": np.complex64,
}
# mlx's dtypes by the names they have on the wire, and the names by dtype.
DTYPES: dict[str, mx.Dtype] = {
    name: getattr(mx, "bool_" if name == "bool" else name) for name in _NUMPY
}
NAMES: dict[mx.Dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def decode_array(tensor: Tensor) -> mx.array:
    """An evaluated array; raises ValueError when dtype, shape and bytes disagree."""
    kind = _NUMPY.get(tensor.dtype)
    if kind is None:
        raise ValueError(f"unknown dtype {tensor.dtype!r}")
    array = mx.array(np.frombuffer(tensor.data, kind).reshape(tuple(tensor.shape)))
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array


def encode_tree(tree: Any, leaves: "RepeatedCompositeFieldContainer[Leaf]", also: Any = ()) -> None:
    """Adds a tree of arrays and plain values (numbers, strings, bools, None) to `leaves`.

    In place, because prefill frames are large and each copy of one takes milliseconds.
    Evaluates its arrays, and the arrays in `also` with them in one go.
    """
    flat: list[tuple[str, Any]] = tree_flatten(tree)
    bits = [_bits(value) if isinstance(value, mx.array) else None for _, value in flat]
    mx.eval(bits, also)
    for (key, value), raw in zip(flat, bits, strict=True):
        leaf = leaves.add(key=key)
        if raw is None:
            leaf.json = json.dumps(value)
        else:
            leaf.tensor.dtype = NAMES[value.dtype]
            leaf.tensor.shape.extend(value.shape)
            leaf.tensor.data = bytes(memoryview(raw))


def decode_tree(leaves: Sequence[Leaf]) -> Any:
    """The tree again; tuples come back as lists.

    Raises FrameError, before anything is allocated, for leaves that are no tree: a list with most
    of its members missing, an array with other bytes than its shape asks for.
    """
    check_leaves(leaves)
    return tree_unflatten([(leaf.key, _decode_leaf(leaf)) for leaf in leaves])


def save_trees(trees: Sequence[Any]) -> list[SavedLeaves]:
    """Trees for a file. Evaluates their arrays, whose memory is shared until one is written to."""
    flat: list[list[tuple[str, Any]]] = [tree_flatten(tree) for tree in trees]
    bits = [[_bits(separate(v)) if isinstance(v, mx.array) else None for _, v in f] for f in flat]
    mx.eval(bits)
    return [
        tuple(
            (key, json.dumps(value))
            if raw is None
            else (key, SavedArray(NAMES[value.dtype], np.asarray(memory(raw))))
            for (key, value), raw in zip(leaves, raws, strict=True)
        )
        for leaves, raws in zip(flat, bits, strict=True)
    ]


def saved_tree(leaves: SavedLeaves) -> Any:
    """A tree of a file again; tuples come back as lists."""
    return tree_unflatten([(key, _saved_leaf(leaf)) for key, leaf in leaves])


def _saved_leaf(leaf: SavedArray | str) -> Any:
    if isinstance(leaf, str):
        return json.loads(leaf)
    array = mx.array(leaf.values)
    return array.view(mx.bfloat16) if leaf.dtype == "bfloat16" else array


def _bits(array: mx.array) -> Any:
    """A view of an array in a dtype that Python's buffers have: bfloat16 as uint16."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def _decode_leaf(leaf: Leaf) -> Any:
    return decode_array(leaf.tensor) if leaf.HasField("tensor") else json.loads(leaf.json)
