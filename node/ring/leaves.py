"""Trees of arrays on the wire: their sizes and shapes, without looking at the arrays' bytes."""

import json
import math
import re
from collections.abc import Iterable, Sequence

from node.ring.bounds import MOST_DEPTH, MOST_DIMENSIONS, MOST_LEAVES, FrameError
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
FLOATS = frozenset({"float32", "float16", "bfloat16"})
# Python takes more for a number than this, "1_000_000" and "+5" among it: a list would be as long.
_NAME = re.compile(r"(?P<index>0|[1-9][0-9]{0,8})|[A-Za-z_][A-Za-z0-9_]{0,63}")
# Characters of a plain value: a number, a short string, true, false or null.
MOST_JSON = 256


def leaf_bytes(leaves: Iterable[Leaf]) -> int:
    """Bytes of all arrays in `leaves`, from their shapes: looking at the data would copy it."""
    tensors = [leaf.tensor for leaf in leaves]
    return sum([math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0) for tensor in tensors])


def check_leaves(leaves: Sequence[Leaf]) -> None:
    """Raises FrameError unless `leaves` are a tree that can be built from what they hold.

    Each array must have at least the bytes that its shape and dtype ask for, each list its
    members.
    """
    if len(leaves) > MOST_LEAVES:
        raise FrameError(f"a tree of {len(leaves)} leaves, of {MOST_LEAVES} at most")
    for leaf in leaves:
        if leaf.key:
            _check_key(leaf.key, len(leaves))
        elif len(leaves) > 1:
            raise FrameError("a tree with a leaf of no name")
        if leaf.HasField("tensor"):
            _check_tensor(leaf)
        else:
            _check_json(leaf.json)


def _check_tensor(leaf: Leaf) -> None:
    tensor = leaf.tensor
    size, shape = ITEM_BYTES.get(tensor.dtype), tensor.shape
    if size is None:
        raise FrameError(f"an array of {tensor.dtype[:20]!r}, which is no dtype")
    if len(shape) > MOST_DIMENSIONS:
        raise FrameError(f"an array of {len(shape)} dimensions, of {MOST_DIMENSIONS} at most")
    if shape and min(shape) < 0:
        raise FrameError(f"an array of {min(shape)} numbers along one dimension")
    # Not by the length of the data, which would copy it: decoding compares that.
    if math.prod(shape) * size > tensor.ByteSize():
        raise FrameError(f"{tensor.ByteSize()} bytes for an array of {tensor.dtype} {list(shape)}")


def _check_key(key: str, count: int) -> None:
    """Lists are as long as the largest index in a key says: no longer than there are leaves."""
    parts = key.split(".", MOST_DEPTH)
    if len(parts) > MOST_DEPTH:
        raise FrameError(f"a tree of more than {MOST_DEPTH} levels")
    for part in parts:
        name = _NAME.fullmatch(part)
        if name is None or (name["index"] and int(part) >= count):
            raise FrameError(f"a leaf at {part[:20]!r} of a tree of {count} leaves")


def _check_json(text: str) -> None:
    if len(text) > MOST_JSON:
        raise FrameError(f"a plain value of {len(text)} characters, of {MOST_JSON} at most")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FrameError(f"a plain value that is no JSON: {error}") from error
    if isinstance(value, list | dict) and value:
        raise FrameError("a plain value that is a list or an object")
