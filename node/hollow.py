"""Hollow models: an mlx-lm model of which only the layers [start, end) are really there.

The model's own forward code stays in charge. What crosses a cut is exactly the return value
of the layer before it: layers before the cut hand on what was received, and the last layer of
a stage ends the forward by an exception.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from node.cacheview import Caches, CacheView
from node.trace import Embedding, Trace, trace
from unicluster.errors import StageError


class _LeaveError(BaseException):
    """Carries a layer's result out of the model's forward; no model code catches it."""

    def __init__(self, result: Any) -> None:
        self.result = result


class HollowModel:
    """Layers [start, end) of a model, computed by the model's own class.

    Args:
        model: the whole model with lazy weights; it is changed in place.
        start, end: the layers that stay; `end` is exclusive.

    Raises StageError when the model can't be cut there.
    """

    def __init__(self, model: nn.Module, model_type: str, start: int, end: int) -> None:
        self.model = model
        self.start, self.end = start, end
        found = trace(model, model_type)
        check_cuttable(found, model_type)
        count = len(found.layers)
        if not 0 <= start < end <= count:
            raise StageError(f"{model_type}: no layers {start} to {end} in a model of {count}")
        self.layer_count = count
        self.layers = found.layers[start:end]
        embedding = found.embeddings[0]
        self.hidden_bytes = embedding.dims * embedding.dtype.size  # of one token
        self.cache_view = CacheView(lambda: make_prompt_cache(model), self._own_entries(found))
        self._received: Any = None
        self._in_tail = False
        for index, layer in enumerate(found.layers):
            self._prepare_layer(index, layer)
        if start > 0:
            self._blank_embeddings(found)

    @property
    def is_whole(self) -> bool:
        """True when nothing was cut off."""
        return self.start == 0 and self.end == self.layer_count

    def forward(self, received: Any, caches: Caches) -> tuple[Any, list[Any]]:
        """What leaves the last layer, lazily, for what crossed the cut before `start`.

        `received` is an array of shape (batch, tokens, hidden), or a tree whose first leaf
        is one. The second result is further arrays to evaluate with the first.
        """
        first = received if isinstance(received, mx.array) else tree_flatten(received)[0][1]
        tokens = mx.zeros(first.shape[:2], mx.int32)
        self._received = received
        return self._run(tokens, caches)

    def front(self, tokens: mx.array, caches: Caches, **inputs: Any) -> tuple[Any, list[Any]]:
        """The head's first half: embedding and layers [0, end) for tokens (batch, tokens)."""
        return self._run(tokens, caches, **inputs)

    def tail(self, tokens: mx.array, received: Any) -> mx.array:
        """The head's second half: final norm and lm_head over what the last layer gave.

        Returns logits (batch, tokens, vocabulary), lazily.
        """
        self._received = received
        self._in_tail = True
        try:
            logits: mx.array = self.model(tokens)
        finally:
            self._in_tail = False
            self._received = None
        return logits

    def _run(self, tokens: mx.array, caches: Caches, **inputs: Any) -> tuple[Any, list[Any]]:
        try:
            self.model(tokens, cache=self.cache_view.full(caches), **inputs)
        except _LeaveError as leave:
            result = leave.result
        finally:
            self._received = None
        return result, self.cache_view.advance(caches, *tokens.shape)

    def _own_entries(self, found: Trace) -> list[int]:
        entries = found.cache_entries[self.start : self.end]
        return sorted({index for handed in entries for index in handed})

    def _prepare_layer(self, index: int, layer: nn.Module) -> None:
        if self.is_whole:
            return
        if not self.start <= index < self.end:
            _drop_arrays(layer)
            _replace_call(layer, lambda _call, _args, _kwargs: self._received)
        elif index == self.end - 1:
            _replace_call(layer, self._last)
        elif self.start == 0:
            _replace_call(layer, self._unless_tail)

    def _last(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._in_tail:
            return self._received
        raise _LeaveError(call(*args, **kwargs))

    def _unless_tail(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._received if self._in_tail else call(*args, **kwargs)

    def _blank_embeddings(self, found: Trace) -> None:
        for embedding in found.embeddings:
            _drop_arrays(embedding.module)
            _replace_call(embedding.module, _zeros_like_embedding(embedding))


def check_cuttable(found: Trace, model_type: str) -> None:
    """Raises StageError when two layers use one cache: a cut between them can't be right."""
    users: dict[int, int] = {}
    for layer, entries in enumerate(found.cache_entries):
        for entry in entries:
            if users.setdefault(entry, layer) != layer:
                raise StageError(
                    f"{model_type}: layers {users[entry]} and {layer} share a cache, so it can't "
                    "be cut into stages yet; run it on one machine"
                )


def _zeros_like_embedding(embedding: Embedding) -> Callable[..., mx.array]:
    def zeros(_call: Any, args: Any, _kwargs: Any) -> mx.array:
        return mx.zeros((*args[0].shape, embedding.dims), embedding.dtype)

    return zeros


def _replace_call(module: nn.Module, replacement: Callable[[Any, Any, Any], Any]) -> None:
    """Gives one module another `__call__`; isinstance, attributes and submodules survive."""
    base = module.__class__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return replacement(lambda *a, **k: base.__call__(self, *a, **k), args, kwargs)

    module.__class__ = type(base.__name__, (base,), {"__call__": __call__})


def _drop_arrays(module: nn.Module) -> None:
    for part in module.modules():
        for name in [name for name, value in part.items() if isinstance(value, mx.array)]:
            del part[name]
