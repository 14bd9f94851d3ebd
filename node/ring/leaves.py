"""Sizes of arrays on the wire, without looking at their bytes."""

import math
from collections.abc import Iterable

from unicluster.v1.tensor_pb2 import Leaf

# Bytes of one number, by the dtype's name on the wire.
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "complex64": 8,
}


def leaf_bytes(leaves: Iterable[Leaf]) -> int:
    """Bytes of all arrays in `leaves`, from their shapes: looking at the data would copy it."""
    tensors = [leaf.tensor for leaf in leaves]
    return sum([math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0) for tensor in tensors])
