"""Hollow models: an mlx-lm model of which only the layers [start, end) are really there.

The model's own forward code stays in charge. What crosses a cut is what the layer before it
hands on, and whatever else the trace saw later layers use: layers before the cut hand on what
was received, and the last layer of a stage ends the forward by an exception.
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
from node.mlx.compat import drop_array, own_arrays
from node.mlx.compat_caches import Caches, replace_update, restore_update
from node.mlx.crossing import (
    Crossing,
    crossing,
    finishing,
    forbidden_cuts,
    hidden_size,
    token_bytes,
)
from node.mlx.dataflow import Embedding, FromCache, FromResult, Trace, replace_call, trace
from node.mlx.tree import children, find, pack, put, unpack, write
from node.ring.stage_input import StageInput
from unicluster.errors import StageError


class _LeaveError(BaseException):
    """Carries a layer's result out of the model's forward; no model code catches it."""

    def __init__(self, result: Any, written: Any) -> None:
        self.tree = (result, written)


@dataclass
class _Values:
    """What crosses a cut, or has been seen so far of what is to cross the next one.

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
        finishes: a later stage that makes the logits, for a head that can't.

    Raises StageError when the model can't be cut there.
    """

    def __init__(
        self, model: nn.Module, model_type: str, start: int, end: int, *, finishes: bool = False
    ) -> None:
        self.model = model
        self.start, self.end = start, end
        found = trace(model, model_type)
        count = len(found.layers)
        if not 0 <= start < end <= count:
            raise StageError(f"{model_type}: no layers {start} to {end} in a model of {count}")
        forbidden = forbidden_cuts(found)
        for cut in (start, end):
            if cut in forbidden:
                raise StageError(
                    f"{model_type}: can't be cut before layer {cut}: {forbidden[cut]}; "
                    "cut it elsewhere or run it on one machine"
                )
        self.layer_count = count
        self.layers = found.layers[start:end]
        self.finishes = finishes
        self.outside = self._outside(found, model_type) if finishes else ()
        self.hidden_bytes = token_bytes(found)  # of one token
        self._trace = found
        self._before = crossing(found, start) if start else None
        self._after = crossing(found, end)
        self._tail = crossing(found, count)
        self._copied = self._copied_entries()
        self.cache_view = CacheView(
            lambda: make_prompt_cache(model), self._own_entries(), self._copied
        )
        self._caches: Caches = []
        self._received: _Values | None = None
        self._seen = _Values()
        self._in_tail = False
        if not self.is_whole:
            self._hollow_out()

    @property
    def is_whole(self) -> bool:
        """True when nothing was cut off."""
        return self.start == 0 and self.end == self.layer_count

    @property
    def stage_input(self) -> StageInput:
        """The form of what `forward` takes; of a stage that is not the first."""
        last = self._trace.results[self.start - 1]
        is_float = last.dtype is None or bool(mx.issubdtype(last.dtype, mx.floating))
        path = last.token_path or (0,)
        return StageInput.at(path, last.token_axis, hidden_size(self._trace), is_float)

    def forward(self, received: Any, caches: Caches) -> tuple[Any, list[Any]]:
        """What leaves the last layer, lazily, for what crossed the cut before `start`.

        `received` is an array of shape (batch, tokens, hidden), or a tree of arrays for models
        whose layers hand on more. The second result is further arrays to evaluate with the
        first.
        """
        assert self._before is not None  # noqa: S101
        self._received = self._unpacked(received, self._before)
        last = self._trace.results[self.start - 1]
        sample = find(self._received.tree, last.token_path or ())
        shape = sample.shape[last.token_axis : last.token_axis + 2]
        return self._run(mx.zeros(shape, mx.int32), caches)

    def front(self, tokens: mx.array, caches: Caches, **inputs: Any) -> tuple[Any, list[Any]]:
        """The head's first half: embedding and layers [0, end) for tokens (batch, tokens)."""
        return self._run(tokens, caches, **inputs)

    def tail(self, tokens: mx.array, received: Any, caches: Caches) -> mx.array:
        """The head's second half: final norm and lm_head over what the last layer gave.

        `caches` are those the front ran with. Returns logits (batch, tokens, vocabulary), lazily.
        """
        self._received = self._unpacked(received, self._tail)
        self._in_tail = True
        try:
            full = self.cache_view.full(caches)
            for entry in self._outer_entries():
                full[entry] = copy.deepcopy(full[entry])  # the front has moved it on already
            logits: mx.array = self.model(tokens, cache=full)
        finally:
            self._in_tail = False
            self._received = None
        return logits

    def finish(self, received: Any, caches: Caches) -> tuple[mx.array, list[Any]]:
        """As `forward`, but on to the logits: of a stage that finishes."""
        hidden, extra = self.forward(received, caches)
        return self.logits(hidden), extra

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits, lazily, of what left the last layer: of a stage that finishes."""
        # They are made of nothing else, so any tokens and caches will do.
        return self.tail(mx.zeros(hidden.shape[:2], mx.int32), hidden, self.cache_view.make())

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

    def _packed(self, values: _Values, across: Crossing) -> Any:
        """As a tree of lists, dicts and arrays; often a single array."""
        known = self._trace.results[across.cut - 1].token_bytes
        result, written = pack(values.tree, lambda path: path in across.paths or path not in known)
        sides = {
            "written": {str(key): part for key, part in written.items()},
            "results": [values.results[source] for source in across.results],
            "embeddings": [values.embeddings[index] for index in across.embeddings],
            "updates": [values.updates[entry] for entry in across.caches],
        }
        used = {name: side for name, side in sides.items() if side}
        return {"result": result, **used} if used or not isinstance(result, mx.array) else result

    def _unpacked(self, packed: Any, across: Crossing) -> _Values:
        before = self._trace.results[across.cut - 1]
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
            results=dict(zip(across.results, packed.get("results", ()), strict=True)),
            embeddings=dict(zip(across.embeddings, packed.get("embeddings", ()), strict=True)),
            updates=dict(zip(across.caches, packed.get("updates", ()), strict=True)),
        )

    def _own_entries(self) -> list[int]:
        owned_before = {e for entries in self._trace.cache_entries[: self.start] for e in entries}
        entries = self._trace.cache_entries[self.start : self.end]
        outer = set(self._outer_entries()) if self.start == 0 else set()
        return sorted({index for handed in entries for index in handed} - owned_before | outer)

    def _outer_entries(self) -> list[int]:
        """Caches that no layer is handed: what runs before the layers keeps something there."""
        handed = {entry for entries in self._trace.cache_entries for entry in entries}
        return [entry for entry in range(self._trace.cache_count) if entry not in handed]

    def _copied_entries(self) -> tuple[int, ...]:
        """Caches of layers before `start` that these layers read."""
        if self._before is None:
            return ()
        needed = set().union(*self._trace.needs[self.start : self.end])
        read = {source.entry for source in needed if isinstance(source, FromCache)}
        for source in needed:
            if isinstance(source, FromResult):
                output = self._trace.results[source.layer].cache_outputs.get(source.path)
                read |= {output[0]} if output is not None else set()
        return tuple(entry for entry in self._before.caches if entry in read)

    def _outside(self, found: Trace, model_type: str) -> tuple[nn.Module, ...]:
        """What is outside the layers and needed for logits."""
        modules = finishing(found) if self.end == self.layer_count else None
        if modules is None:
            span = f"layers {self.start} to {self.end}"
            raise StageError(f"{model_type}: a stage of {span} can't make the logits by itself")
        return tuple(module for path, module in self.model.named_modules() if path in modules)

    def _hollow_out(self) -> None:
        kept = {id(part) for layer in self.layers for part in layer.modules()}
        kept |= {id(module) for module in self.outside}
        for index, layer in enumerate(self._trace.layers):
            if not self.start <= index < self.end:
                _drop_arrays(layer, kept)
            replace_call(layer, self._layer_call(index))
        for index, embedding in enumerate(self._trace.embeddings):
            if self.start > 0:
                _drop_arrays(embedding.module, kept)
            replace_call(embedding.module, self._embedding_call(index, embedding))

    def _layer_call(self, index: int) -> Callable[..., Any]:
        wanted = [source for source in self._after.results if source.layer == index]
        arguments = self._trace.shared_arguments

        def run(call: Callable[..., Any], _layer: nn.Module, args: Any, kwargs: Any) -> Any:
            given = dict(enumerate(args)) | kwargs
            written = {key: given[key] for key in arguments}
            if self._in_tail or index < self.start:
                return self._hand_on(index, written)
            result = call(*args, **kwargs)
            if index == self.end - 1:
                raise _LeaveError(result, written)
            for source in wanted:
                self._seen.results[source] = find((result, written), source.path)
            return result

        return run

    def _hand_on(self, index: int, written: dict[int | str, Any]) -> Any:
        """What a layer that is not here gives: what was received of it."""
        received = self._received
        assert received is not None  # noqa: S101
        result, other = received.tree
        if index == (self.layer_count if self._in_tail else self.start) - 1:
            for key, part in other.items():
                write(written[key], dict(children(part)))
        for source, array in received.results.items():
            if source.layer == index:
                result, _ = put((result, {}), source.path, array)
        if self._in_tail:
            return result
        copied = {
            entry: self._caches[entry].update_and_fetch(*received.updates[entry])
            for entry in self._copied
            if self._trace.writers[entry] == (index,)
        }
        for path, (entry, which) in self._trace.results[index].cache_outputs.items():
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
        """Notes what is written to caches that later stages keep copies of."""
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
            for name, _ in own_arrays(part):
                drop_array(part, name)
