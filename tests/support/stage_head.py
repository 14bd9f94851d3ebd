"""A head's side of one stage, in the same process: sends frames, valid or not."""

from collections.abc import Callable
from typing import Any

import numpy as np

from node.ring.frame_server import FrameServer
from unicluster.v1.stage_pb2 import CacheOp, Frame, StageReport
from unicluster.v1.tensor_pb2 import Leaf

Array = np.ndarray[Any, np.dtype[Any]]


def leaf(array: Array, key: str = "") -> Leaf:
    """An array on the wire."""
    made = Leaf(key=key)
    made.tensor.dtype = array.dtype.name
    made.tensor.shape.extend(array.shape)
    made.tensor.data = array.tobytes()
    return made


def op(number: int, name: str, **fields: Any) -> CacheOp:
    """The operation `name` on cache `number`."""
    made = CacheOp(cache=number)
    getattr(made, name).SetInParent()
    for field, value in fields.items():
        if isinstance(value, list):
            getattr(getattr(made, name), field).extend(value)
        else:
            setattr(getattr(made, name), field, value)
    return made


class StageHead:
    """A session with a stage that is the last of its ring.

    inputs: makes what a (batch, tokens) forward takes: hidden states or token ids.
    """

    def __init__(self, stage: FrameServer[Any, Any], inputs: Callable[[int, int], Array]) -> None:
        self.stage = stage
        self.inputs = inputs
        self.index = 1
        self.session = stage.open(self.index, last=True)
        self._frames = 0

    def send(self, *ops: CacheOp, **fields: Any) -> Frame:
        """Serves a frame of operations; `fields` are those of Frame, `cache` that of the part."""
        return self.serve(self.frame(*ops, **fields))

    def frame(self, *ops: CacheOp, cache: int = 0, **fields: Any) -> Frame:
        self._frames += 1
        made = Frame(**({"id": self._frames} | fields))
        made.parts.add(stage=self.index, ops=ops, cache=cache)
        return made

    def forward(self, cache: int, batch: int, tokens: int, *ops: CacheOp, **more: Any) -> Frame:
        hidden = [leaf(self.inputs(batch, tokens))]
        return self.send(*ops, cache=cache, hidden=hidden, **more)

    def serve(self, frame: Frame) -> Frame:
        self.stage.serve(self.session, frame, 0.0)
        self.stage.look_ahead(self.session)
        return frame

    def report(self, *ops: CacheOp) -> StageReport:
        return self.send(*ops).reports[0]

    def end(self) -> None:
        self.stage.end(self.session)
