"""Trees of MLX arrays to and from their wire form: raw bytes with dtype and shape."""

import json
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from unicluster.v1.tensor_pb2 import Leaf, Tensor

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


def dtype_name(dtype: mx.Dtype) -> str:
    """`float32` for `mlx.core.float32`."""
    return str(dtype).removeprefix("mlx.core.")


def encode_array(array: mx.array) -> Tensor:
    """The wire form of one array; evaluates it."""
    (leaf,) = encode_tree(array)
    return leaf.tensor


def decode_array(tensor: Tensor) -> mx.array:
    """An evaluated array; raises ValueError when dtype, shape and bytes disagree."""
    kind = _NUMPY.get(tensor.dtype)
    if kind is None:
        raise ValueError(f"unknown dtype {tensor.dtype!r}")
    array = mx.array(np.frombuffer(tensor.data, kind).reshape(tuple(tensor.shape)))
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array


def encode_tree(tree: Any, also: Any = ()) -> list[Leaf]:
    """Leaves of a tree of arrays and plain values (numbers, strings, bools, None).

    Evaluates its arrays, and the arrays in `also` with them in one go.
    """
    leaves = tree_flatten(tree)
    bits = [_bits(leaf) if isinstance(leaf, mx.array) else None for _, leaf in leaves]
    mx.eval(bits, also)
    return [_encode_leaf(key, leaf, raw) for (key, leaf), raw in zip(leaves, bits, strict=True)]


def decode_tree(leaves: Iterable[Leaf]) -> Any:
    """The tree again; tuples come back as lists."""
    return tree_unflatten([(leaf.key, _decode_leaf(leaf)) for leaf in leaves])


def _bits(array: mx.array) -> mx.array:
    """What numpy can read: bfloat16 as uint16."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def _encode_leaf(key: str, leaf: Any, bits: mx.array | None) -> Leaf:
    if bits is None:
        return Leaf(key=key, json=json.dumps(leaf))
    data = np.array(bits, copy=False).tobytes()
    return Leaf(key=key, tensor=Tensor(dtype=dtype_name(leaf.dtype), shape=leaf.shape, data=data))


def _decode_leaf(leaf: Leaf) -> Any:
    return decode_array(leaf.tensor) if leaf.HasField("tensor") else json.loads(leaf.json)
