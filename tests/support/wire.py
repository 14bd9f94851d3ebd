"""Frames as they cross a hop, without the network."""

from collections.abc import Sequence
from typing import Any

from node.mlx.tensors import decode_tree, encode_tree
from unicluster.v1.stage_pb2 import Frame
from unicluster.v1.tensor_pb2 import Leaf


def over_the_wire(tree: Any) -> Any:
    """The tree as the next stage sees it."""
    return decode_tree(on_the_wire(tree))


def on_the_wire(tree: Any) -> Sequence[Leaf]:
    """The tree as it travels."""
    frame = Frame()
    encode_tree(tree, frame.hidden)
    return Frame.FromString(frame.SerializeToString()).hidden
