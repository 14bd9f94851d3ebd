"""What crosses a hop, without the network."""

from typing import Any

from node.tensors import decode_tree, encode_tree
from unicluster.v1.stage_pb2 import Frame


def over_the_wire(tree: Any) -> Any:
    """The tree as the next stage sees it."""
    frame = Frame()
    encode_tree(tree, frame.hidden)
    return decode_tree(Frame.FromString(frame.SerializeToString()).hidden)
