"""The hidden states that a stage receives: where their batch and tokens are, and their bounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from node.ring.bounds import FrameError
from node.ring.leaves import FLOATS
from unicluster.v1.tensor_pb2 import Leaf, Tensor

INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"})


@dataclass(frozen=True)
class StageInput:
    """Form of the activations that cross the cut before a stage.

    keys: of the leaf whose shape says batch and tokens, alone or beside others. axis: of its
    batch; tokens follow. width: numbers of a token where the tree is one hidden state, else 0.
    """

    keys: tuple[str, ...]
    axis: int
    width: int
    is_float: bool

    @classmethod
    def at(cls, path: tuple[object, ...], axis: int, width: int, is_float: bool) -> "StageInput":
        """Input with the output tree of the layer before: (return value, written arguments).

        path: of the array in it whose axes from `axis` on are batch and tokens.
        """
        side, *rest = path
        key = ".".join(["written" if side else "result", *map(str, rest)])
        return cls((key,) if side or rest else ("", key), axis, width, is_float)

    def extent(self, leaves: Sequence[Leaf]) -> tuple[int, int]:
        """(batch, tokens). Raises FrameError for a tree that the layers can't take."""
        tensor = next((leaf.tensor for leaf in leaves if leaf.key in self.keys), None)
        if tensor is None or len(tensor.shape) < self.axis + 2:
            raise FrameError(f"a frame without hidden state at {self.keys[-1]!r}")
        if self.width and (len(leaves) > 1 or len(tensor.shape) != 3):
            raise FrameError(f"{len(leaves)} arrays, the first {list(tensor.shape)}, not one of 3")
        if self.width and tensor.shape[2] != self.width:
            raise FrameError(f"a hidden state of {tensor.shape[2]} numbers, not {self.width}")
        if self.is_float and tensor.dtype not in FLOATS:
            raise FrameError(f"a hidden state of {tensor.dtype}")
        batch, tokens = tensor.shape[self.axis : self.axis + 2]
        if not batch or not tokens:
            raise FrameError(f"a hidden state of shape {list(tensor.shape)}")
        return batch, tokens


def check_indexes(leaves: Sequence[Leaf], most: int) -> None:
    """Raises FrameError for integers beside the hidden state that no position can be.

    They are offsets, and places of tokens that a layer before chose to attend to.
    """
    for leaf in leaves:
        if leaf.tensor.dtype in INTEGERS:
            numbers = _numbers(leaf.tensor)
            if numbers.size and not -most <= int(numbers.min()) <= int(numbers.max()) <= most:
                raise FrameError(
                    f"positions {numbers.min()} to {numbers.max()} in {leaf.key}, of {most} tokens"
                )


def _numbers(tensor: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.integer]]":
    return np.frombuffer(tensor.data, tensor.dtype)
