"""Stage 0 of ggml at the head, where a HollowModel of MLX would be."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from node.ggml.layers import Layers
from node.ggml.stage import GgmlStage
from node.ggml.wire import decode
from node.mlx.compat_caches import growing_cache, members, recurrent_cache
from node.pipeline.choosers import Chooser, settle
from node.pipeline.pending_logits import PendingLogits
from node.pipeline.remote_cache import RemoteCache, RemoteStage
from node.prefixes.store import PrefixStore
from unicluster.errors import InputError, StageError
from unicluster.v1.stage_pb2 import CacheOp, Choice, Frame, StageReport
from unicluster.v1.tensor_pb2 import Leaf

# As in the pipeline: the logits of longer inputs are computed only if they are read.
PUSHED_TOKENS = 16


class GgmlFront:
    """Layers [0, end) here; the last stage computes final norm and lm_head.

    To a PipelineModel it is what a HollowModel is. Its cache is a handle, as those of other
    stages are, but operations on it are carried out here.
    """

    shares_copies = True

    def __init__(self, layers: Layers, stage: GgmlStage, *, is_whole: bool) -> None:
        self.cache_view = _View(self)
        self.model = _Whole(self)
        self.hidden_bytes = 4 * layers.sizes.hidden
        self.vocabulary = stage.vocabulary
        self.is_whole = is_whole
        self.start = 0
        self._recurrent = layers.recurrent
        self._engine = stage
        self._session = stage.open(0, last=is_whole)
        self._stage = RemoteStage(0, self._ask, lambda: None)
        self._dropped: deque[int] = deque()
        self._frames = 0

    def keep_prefixes(self, store: PrefixStore | None) -> None:
        """Its handle's operations Save and Recall are carried out here."""
        self._engine.prefixes = store

    @property
    def threads(self) -> int:
        """Threads that compute a token; 0: not on the CPU."""
        return self._engine.threads

    def make_cache(self) -> RemoteCache:
        return self._stage.make()

    def fresh(self) -> list[Any]:
        """A cache of MLX that grows and batches as those here do."""
        return [recurrent_cache() if self._recurrent else growing_cache()]

    def front(self, tokens: mx.array, caches: list[Any]) -> tuple[mx.array, list[Any]]:
        """Output of the last layer here, (batch, tokens, hidden), for tokens (batch, tokens)."""
        frame = self._forward(tokens, caches, hold=False)
        return _array(frame), []

    def final_logits(self, tokens: mx.array, received: mx.array, caches: list[Any]) -> mx.array:
        """The logits, which came from the last stage."""
        return received

    def logits(self, tokens: mx.array, caches: list[Any], choosers: Sequence[Chooser] = ()) -> Any:
        """Logits (batch, tokens, vocabulary), of a model all of whose layers are here."""
        hold = tokens.shape[1] > PUSHED_TOKENS
        choices = [chooser.ask(self.vocabulary) for chooser in choosers]
        frame = self._forward(tokens, caches, hold=hold, choices=choices)
        if not hold:
            chosen = settle(frame, choosers, tokens.shape, self.vocabulary)
            return _array(frame) if chosen is None else chosen
        number = frame.id
        return PendingLogits(
            lambda: _array(self._serve(Frame(claim=number))),
            lambda: self._dropped.append(number),
        )

    def _forward(
        self, tokens: mx.array, caches: list[Any], hold: bool, choices: Sequence[Choice] = ()
    ) -> Frame:
        (handle,) = caches
        if members(handle) is not None:
            raise InputError("a saved prompt cache can't be loaded into a head of ggml")
        self._frames += 1
        ids = np.array(tokens).astype(np.uint32)
        frame = Frame(id=self._frames, hold=hold, choices=choices)
        leaf = Leaf()
        leaf.tensor.dtype = "uint32"
        leaf.tensor.shape.extend(ids.shape)
        leaf.tensor.data = ids.tobytes()
        frame.hidden.append(leaf)
        version = handle.before_forward()
        self._serve(frame, cache=handle.number)
        handle.after_forward(version, frame.reports[0])
        return frame

    def _ask(self, stage: RemoteStage, operation: CacheOp) -> StageReport:
        stage.operations.append(operation)
        return self._serve(Frame()).reports[0]

    def _serve(self, frame: Frame, cache: int = 0) -> Frame:
        """Serves a frame with the cache operations recorded since the last one."""
        operations = []
        while self._stage.operations:
            operations.append(self._stage.operations.popleft())
        while self._dropped:
            frame.dropped.append(self._dropped.popleft())
        frame.parts.add(stage=0, ops=operations, cache=cache)
        self._engine.serve(self._session, frame, time.perf_counter())
        return frame


class _View:
    """The part of a stage's CacheView that a pipeline looks at."""

    def __init__(self, front: GgmlFront) -> None:
        self._front = front

    def __len__(self) -> int:
        return 1

    def make(self) -> list[Any]:
        return [self._front.make_cache()]

    def fresh(self) -> list[Any]:
        return self._front.fresh()

    def full(self, caches: list[Any]) -> list[Any]:
        return caches


class _Whole(nn.Module):
    """A model all of whose layers are here."""

    def __init__(self, front: GgmlFront) -> None:
        super().__init__()
        # Kept from MLX, which takes attributes for parts of a module.
        self._logits: Callable[..., Any] = front.logits
        self.args = None

    def __call__(self, tokens: mx.array, cache: list[Any], choosers: Sequence[Chooser] = ()) -> Any:
        return self._logits(tokens, cache, choosers)


def _array(frame: Frame) -> mx.array:
    if not frame.hidden:
        raise StageError("the stage gave nothing back")
    array, _ = decode(frame.hidden)
    return mx.array(array)
