"""Arrays of a frame, without MLX."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from node.ggml.library import Floats
from unicluster.errors import StageError
from unicluster.v1.tensor_pb2 import Leaf

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

Array = np.ndarray[Any, np.dtype[Any]]

_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "uint32": np.uint32,
    "uint8": np.uint8,
}
BFLOAT16 = "bfloat16"


def decode(leaves: Sequence[Leaf]) -> tuple[Array, str]:
    """The one array of a frame, and its dtype on the wire; bfloat16 becomes float32.

    Raises StageError for an input that layers of a GGUF can't take.
    """
    if len(leaves) != 1 or not leaves[0].HasField("tensor"):
        raise StageError("the stage before outputs more than a hidden state, which ggml can't use")
    tensor = leaves[0].tensor
    shape = tuple(tensor.shape)
    if tensor.dtype == BFLOAT16:
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape), tensor.dtype
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise StageError(f"a hidden state of {tensor.dtype}, which ggml can't use")
    return np.frombuffer(tensor.data, kind).reshape(shape), tensor.dtype


def encode(
    array: Floats, leaves: "RepeatedCompositeFieldContainer[Leaf]", dtype: str = "float32"
) -> None:
    """Adds an array to a frame, as float32, float16 or bfloat16."""
    tensor = leaves.add().tensor
    tensor.dtype = dtype
    tensor.shape.extend(array.shape)
    if dtype == BFLOAT16:
        bits = np.ascontiguousarray(array).view(np.uint32)
        # To the nearest, and to the even one of two that are as near.
        tensor.data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    else:
        tensor.data = np.ascontiguousarray(array, _TYPES[dtype]).tobytes()
