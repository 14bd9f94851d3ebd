"""Hollow models: an mlx-lm model of which only the layers [start, end) are really there.

The model's own forward code stays in charge. The output of the layer before a cut crosses it, and
whatever else the dataflow shows later layers to use: layers before the cut return the received
activations, and the last layer of a stage ends the forward by an exception.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.cache_view import CacheView
from node.mlx.compat import bound_gathers, direct_arrays, drop_array
from node.mlx.compat_caches import Caches, replace_update, restore_update
from node.mlx.crossing import (
    Activations,
    activations_at,
    forbidden_cuts,
    hidden_size,
    lm_head_modules,
    token_bytes,
)
from node.mlx.dataflow import (
    Dataflow,
    Embedding,
    FromCache,
    FromResult,
    replace_call,
    trace_dataflow,
)
from node.mlx.tree import children, find, pack, put, unpack, write
from node.prefixes.store import PrefixStore
from node.ring.stage_input import StageInput
from unicluster.errors import StageError


class _LeaveError(BaseException):
    """Carries a layer's result out of the model's forward; no model code catches it."""

    def __init__(self, result: Any, written: Any) -> None:
        self.tree = (result, written)


@dataclass
class _Values:
    """Activations that crossed a cut, or were recorded so far to cross the next one.

    tree: (what the last layer returned, what it wrote to its arguments).
    results, embeddings: arrays by where they come from. updates: what was written to caches.
    """

    tree: Any = None
    results: dict[FromResult, Any] = field(default_factory=dict)
    embeddings: dict[int, mx.array] = field(default_factory=dict)
    updates: dict[int, list[mx.array]] = field(default_factory=dict)


class HollowModel:
    """Layers [start, end) of a model, computed by the model's own class.

    Args:
        model: the whole model with lazy weights; it is changed in place.
        start, end: the layers that stay; `end` is exclusive.
        has_lm_head: a later stage that also computes the logits, for a head that can't.

    Raises StageError when the model can't be cut there.
    """

    shares_copies = False
    threads = 0

    def __init__(
        self, model: nn.Module, model_type: str, start: int, end: int, *, has_lm_head: bool = False
    ) -> None:
        self.model = model
        bound_gathers(model)
        self.start, self.end = start, end
        dataflow = trace_dataflow(model, model_type)
        count = len(dataflow.layers)
        if not 0 <= start < end <= count:
            raise StageError(f"{model_type}: no layers {start} to {end} in a model of {count}")
        forbidden = forbidden_cuts(dataflow)
        for cut in (start, end):
            if cut in forbidden:
                raise StageError(
                    f"{model_type}: can't be cut before layer {cut}: {forbidden[cut]}; "
                    "cut it elsewhere or run it on one machine"
                )
        self.layer_count = count
        self.layers = dataflow.layers[start:end]
        self.has_lm_head = has_lm_head
        self.outside = self._outside(dataflow, model_type) if has_lm_head else ()
        self.hidden_bytes = token_bytes(dataflow)  # of one token
        self.vocabulary = 0  # of logits that come from the last stage: here it has none
        self._dataflow = dataflow
        self._before = activations_at(dataflow, start) if start else None
        self._after = activations_at(dataflow, end)
        self._final = activations_at(dataflow, count)
        self._copied = self._copied_entries()
        self.cache_view = CacheView(
            lambda: make_prompt_cache(model), self._stage_entries(), self._copied
        )
        self._caches: Caches = []
        self._received: _Values | None = None
        self._seen = _Values()
        self._in_final_logits = False
        if not self.is_whole:
            self._hollow_out()

    @property
    def is_whole(self) -> bool:
        """True when nothing was cut off."""
        return self.start == 0 and self.end == self.layer_count

    @property
    def stage_input(self) -> StageInput:
        """The form of what `forward` takes; of a stage that is not the first."""
        last = self._dataflow.results[self.start - 1]
        is_float = last.dtype is None or bool(mx.issubdtype(last.dtype, mx.floating))
        path = last.token_path or (0,)
        return StageInput.at(path, last.token_axis, hidden_size(self._dataflow), is_float)

    def forward(self, received: Any, caches: Caches) -> tuple[Any, list[Any]]:
        """Output of the last layer, lazily, for the activations that crossed the cut at `start`.

        `received` is an array of shape (batch, tokens, hidden), or a tree of arrays for models
        whose layers output more. The second result is further arrays to evaluate with the first.
        """
        assert self._before is not None  # noqa: S101
        self._received = self._unpacked(received, self._before)
        last = self._dataflow.results[self.start - 1]
        sample = find(self._received.tree, last.token_path or ())
        shape = sample.shape[last.token_axis : last.token_axis + 2]
        return self._run(mx.zeros(shape, mx.int32), caches)

    def keep_prefixes(self, store: PrefixStore | None) -> None:
        """Nothing: its caches are in the head's hands, which saves them itself."""

    def front(self, tokens: mx.array, caches: Caches, **inputs: Any) -> tuple[Any, list[Any]]:
        """The head's first half: embedding and layers [0, end) for tokens (batch, tokens)."""
        return self._run(tokens, caches, **inputs)

    def final_logits(self, tokens: mx.array, received: Any, caches: Caches) -> mx.array:
        """The head's second half: final norm and lm_head over the output of the last layer.

        `caches` are those the front ran with. Returns logits (batch, tokens, vocabulary), lazily.
        """
        self._received = self._unpacked(received, self._final)
        self._in_final_logits = True
        try:
            full = self.cache_view.full(caches)
            for entry in self._outer_entries():
                full[entry] = copy.deepcopy(full[entry])  # the front has moved it on already
            logits: mx.array = self.model(tokens, cache=full)
        finally:
            self._in_final_logits = False
            self._received = None
        return logits

    def forward_logits(self, received: Any, caches: Caches) -> tuple[mx.array, list[Any]]:
        """Logits, lazily, for received activations: `forward` on a stage with the lm_head."""
        hidden, extra = self.forward(received, caches)
        return self.logits(hidden), extra

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits, lazily, of the last layer's output on a stage with the lm_head."""
        # They are made of nothing else, so any tokens and caches will do.
        return self.final_logits(
            mx.zeros(hidden.shape[:2], mx.int32), hidden, self.cache_view.make()
        )

    def _run(self, tokens: mx.array, caches: Caches, **inputs: Any) -> tuple[Any, list[Any]]:
        received = self._received or _Values()
        self._seen = _Values(
            results=dict(received.results),
            embeddings=dict(received.embeddings),
            updates=dict(received.updates),
        )
        for source in self._after.results:
            if source.layer == self.start - 1:
                self._seen.results[source] = find(received.tree, source.path)
        self._caches = self.cache_view.full(caches)
        try:
            with self._recorded_updates():
                self.model(tokens, cache=self._caches, **inputs)
        except _LeaveError as leave:
            self._seen.tree = leave.tree
            packed = self._packed(self._seen, self._after)
        finally:
            self._received = None
            self._seen = _Values()
            self._caches = []
        return packed, self.cache_view.advance(caches, *tokens.shape)

    def _packed(self, values: _Values, activations: Activations) -> Any:
        """Packs activations as a tree of lists, dicts and arrays; often a single array."""
        known = self._dataflow.results[activations.cut - 1].token_bytes
        result, written = pack(
            values.tree, lambda path: path in activations.paths or path not in known
        )
        sides = {
            "written": {str(key): part for key, part in written.items()},
            "results": [values.results[source] for source in activations.results],
            "embeddings": [values.embeddings[index] for index in activations.embeddings],
            "updates": [values.updates[entry] for entry in activations.caches],
        }
        used = {name: side for name, side in sides.items() if side}
        return {"result": result, **used} if used or not isinstance(result, mx.array) else result

    def _unpacked(self, packed: Any, activations: Activations) -> _Values:
        before = self._dataflow.results[activations.cut - 1]
        if isinstance(packed, mx.array):
            # A stage of another engine may have computed it in another dtype.
            packed = {"result": packed.astype(before.dtype) if before.dtype else packed}
        like, written = before.like
        sides = packed.get("written", {})
        return _Values(
            tree=(
                unpack(packed.get("result"), like),
                {key: unpack(sides.get(str(key)), part) for key, part in written.items()},
            ),
            results=dict(zip(activations.results, packed.get("results", ()), strict=True)),
            embeddings=dict(zip(activations.embeddings, packed.get("embeddings", ()), strict=True)),
            updates=dict(zip(activations.caches, packed.get("updates", ()), strict=True)),
        )

    def _stage_entries(self) -> list[int]:
        owned_before = {
            e for entries in self._dataflow.cache_entries[: self.start] for e in entries
        }
        entries = self._dataflow.cache_entries[self.start : self.end]
        outer = set(self._outer_entries()) if self.start == 0 else set()
        return sorted({index for handed in entries for index in handed} - owned_before | outer)

    def _outer_entries(self) -> list[int]:
        """Caches that no layer gets: modules that run before the layers use them."""
        handed = {entry for entries in self._dataflow.cache_entries for entry in entries}
        return [entry for entry in range(self._dataflow.cache_count) if entry not in handed]

    def _copied_entries(self) -> tuple[int, ...]:
        """Caches of layers before `start` that these layers read."""
        if self._before is None:
            return ()
        needed = set().union(*self._dataflow.needs[self.start : self.end])
        read = {source.entry for source in needed if isinstance(source, FromCache)}
        for source in needed:
            if isinstance(source, FromResult):
                output = self._dataflow.results[source.layer].cache_outputs.get(source.path)
                read |= {output[0]} if output is not None else set()
        return tuple(entry for entry in self._before.caches if entry in read)

    def _outside(self, dataflow: Dataflow, model_type: str) -> tuple[nn.Module, ...]:
        """Modules outside the layers that the logits need."""
        modules = lm_head_modules(dataflow) if self.end == self.layer_count else None
        if modules is None:
            span = f"layers {self.start} to {self.end}"
            raise StageError(f"{model_type}: a stage of {span} can't make the logits by itself")
        return tuple(module for path, module in self.model.named_modules() if path in modules)

    def _hollow_out(self) -> None:
        kept = {id(part) for layer in self.layers for part in layer.modules()}
        kept |= {id(module) for module in self.outside}
        for index, layer in enumerate(self._dataflow.layers):
            if not self.start <= index < self.end:
                _drop_arrays(layer, kept)
            replace_call(layer, self._layer_call(index))
        for index, embedding in enumerate(self._dataflow.embeddings):
            if self.start > 0:
                _drop_arrays(embedding.module, kept)
            replace_call(embedding.module, self._embedding_call(index, embedding))

    def _layer_call(self, index: int) -> Callable[..., Any]:
        wanted = [source for source in self._after.results if source.layer == index]
        arguments = self._dataflow.shared_arguments

        def run(call: Callable[..., Any], _layer: nn.Module, args: Any, kwargs: Any) -> Any:
            arguments_by_key = dict(enumerate(args)) | kwargs
            written = {key: arguments_by_key[key] for key in arguments}
            if self._in_final_logits or index < self.start:
                return self._received_output(index, written)
            result = call(*args, **kwargs)
            if index == self.end - 1:
                raise _LeaveError(result, written)
            for source in wanted:
                self._seen.results[source] = find((result, written), source.path)
            return result

        return run

    def _received_output(self, index: int, written: dict[int | str, Any]) -> Any:
        """Output of a layer that is not here, from the received activations."""
        received = self._received
        assert received is not None  # noqa: S101
        result, other = received.tree
        if index == (self.layer_count if self._in_final_logits else self.start) - 1:
            for key, part in other.items():
                write(written[key], dict(children(part)))
        for source, array in received.results.items():
            if source.layer == index:
                result, _ = put((result, {}), source.path, array)
        if self._in_final_logits:
            return result
        copied = {
            entry: self._caches[entry].update_and_fetch(*received.updates[entry])
            for entry in self._copied
            if self._dataflow.writers[entry] == (index,)
        }
        for path, (entry, which) in self._dataflow.results[index].cache_outputs.items():
            if entry in copied:
                result, _ = put((result, {}), path, copied[entry][which])
        return result

    def _embedding_call(self, index: int, embedding: Embedding) -> Callable[..., mx.array]:
        def run(call: Callable[..., Any], _module: nn.Module, args: Any, kwargs: Any) -> mx.array:
            if self.start == 0:
                result: mx.array = call(*args, **kwargs)
            elif self._received is not None and index in self._received.embeddings:
                result = self._received.embeddings[index]
            else:
                result = mx.zeros((*args[0].shape, embedding.dims), embedding.dtype)
            self._seen.embeddings[index] = result
            return result

        return run

    @contextmanager
    def _recorded_updates(self) -> Iterator[None]:
        """Records updates of caches that later stages keep copies of."""
        entries = [entry for entry in self._after.caches if entry not in self._seen.updates]
        for entry in entries:
            self._record_updates(entry, self._caches[entry])
        try:
            yield
        finally:
            for entry in entries:
                restore_update(self._caches[entry])

    def _record_updates(self, entry: int, cache: Any) -> None:
        update, seen = cache.update_and_fetch, self._seen

        def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
            seen.updates[entry] = [keys, values]
            return update(keys, values)

        replace_update(cache, update_and_fetch)


def _drop_arrays(module: nn.Module, kept: set[int]) -> None:
    """Frees a module's arrays, but for those of the modules `kept`, by id."""
    for part in module.modules():
        if id(part) not in kept:
            for name, _ in direct_arrays(part):
                drop_array(part, name)
