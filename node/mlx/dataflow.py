"""One lazy run of the whole model, to learn how its forward uses layers and caches.

Every array that enters or leaves a layer is marked in MLX's lazy graph, which then shows the
sources that each layer was computed from, so that no list of architectures is needed: whatever
reaches a layer other than through the layer before it is known, and crosses the cut, or forbids it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.compat import direct_arrays, marked, override, restore_class, set_array
from node.mlx.compat_caches import replace_update
from node.mlx.graph import dependencies
from node.mlx.tree import Path, arrays, children, is_mutable, replace_arrays, skeleton
from unicluster.errors import StageError

# Two sizes that occur nowhere else, by which the axes of batch and tokens are dataflow.
BATCH, TOKENS = 3, 5

Call = Callable[..., Any]


@dataclass(frozen=True)
class Embedding:
    """An embedding outside the layers: size and dtype of its output, and how often it runs."""

    module: nn.Module
    dims: int
    dtype: mx.Dtype
    called: int = 1


@dataclass(frozen=True)
class FromEmbedding:
    """Output of the embedding of that index."""

    index: int


@dataclass(frozen=True)
class FromResult:
    """An array in the output of a layer."""

    layer: int
    path: Path


@dataclass(frozen=True)
class FromCache:
    """The contents of a cache, by its index in the cache list."""

    entry: int


@dataclass(frozen=True)
class FromInside:
    """Something made within a layer that got out past its result and its caches."""

    layer: int


@dataclass(frozen=True)
class FromWeight:
    """A parameter of a module outside the layers, by the module's path in the model."""

    module: str


Source = FromWeight | FromEmbedding | FromResult | FromCache | FromInside


@dataclass(frozen=True)
class Result:
    """Layer output: the return value and the contents of arguments that a layer may write to.

    like: a tree of that form, without arrays.
    token_path, token_axis: an array in it whose axes at token_axis are (batch, tokens).
    dtype: of that array.
    token_bytes: bytes of each array per token.
    cache_outputs: arrays that are what a cache returned: (entry, which of its outputs).
    """

    like: Any
    token_path: Path | None
    token_axis: int
    dtype: mx.Dtype | None
    token_bytes: dict[Path, int]
    cache_outputs: dict[Path, tuple[int, int]]


@dataclass(frozen=True)
class Dataflow:
    """Dataflow of a forward pass.

    layers: the layers in the order they run, each once.
    cache_entries: for each layer, the indices in the cache list that it was handed.
    cache_count: the length of the cache list.
    writers: for each cache entry, the layers that wrote to it.
    embeddings: the embedding modules that ran outside the layers.
    results: the output of each layer.
    shared_arguments: the arguments through which layers pass further values, by position or name.
    needs: for each layer, and last for what follows the layers, the sources it is computed from.
    """

    layers: tuple[nn.Module, ...]
    cache_entries: tuple[tuple[int, ...], ...]
    cache_count: int
    writers: dict[int, tuple[int, ...]]
    embeddings: tuple[Embedding, ...]
    results: tuple[Result, ...]
    shared_arguments: tuple[int | str, ...]
    needs: tuple[frozenset[Source], ...]


def trace_dataflow(model: nn.Module, model_type: str) -> Dataflow:
    """Follows a short prompt through `model` without evaluating anything.

    Raises StageError, by name, when layers don't run once each and in order: such a
    model can't be cut.
    """
    layers = tuple(model.layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if id(m) not in inside]
    recorder = _Recorder(make_prompt_cache(model))
    with (
        _marked_weights(model, {id(m) for m in outside}, recorder.weight),
        watched(layers, recorder.layer),
        watched([m for m in outside if hasattr(m, "as_linear")], recorder.embedding),
    ):
        logits = model(mx.zeros((BATCH, TOKENS), mx.int32), cache=recorder.cache)
    if [id(layer) for layer in recorder.ran] != [id(layer) for layer in layers]:
        raise StageError(
            f"{model_type}: its layers don't run once each and in order, so it can't be cut "
            "into stages; run it on one machine"
        )
    dataflow = recorder.dataflow(layers, logits)
    # The watched classes outlive this call as garbage: they must not keep weights alive.
    vars(recorder).clear()
    return dataflow


class _Recorder:
    """Records the calls of layers and embeddings while the model runs."""

    def __init__(self, cache: list[Any]) -> None:
        self.cache = cache
        self.ran: list[nn.Module] = []
        self._entry_of = {id(entry): index for index, entry in enumerate(cache)}
        self._handed: list[tuple[int, ...]] = []
        self._arguments: list[dict[int | str, Any]] = []
        self._embeddings: list[Embedding] = []
        self._results: list[Result] = []
        self._writers: dict[int, list[int]] = {}
        self._cache_outputs: dict[int, tuple[mx.array, int, int]] = {}
        self._sources: list[tuple[Source, mx.array]] = []
        self._sinks: list[tuple[int, mx.array]] = []
        for index, entry in enumerate(cache):
            if hasattr(entry, "update_and_fetch"):
                self._watch_updates(index, entry)

    def weight(self, module: str, array: mx.array) -> mx.array:
        return self._source(FromWeight(module), array)

    def embedding(self, call: Call, module: nn.Module, args: Any, kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        modules = [embedding.module for embedding in self._embeddings]
        index = next((i for i, known in enumerate(modules) if known is module), len(modules))
        if index == len(modules):
            self._embeddings.append(Embedding(module, result.shape[-1], result.dtype))
        else:
            before = self._embeddings[index]
            self._embeddings[index] = replace(before, called=before.called + 1)
        return self._source(FromEmbedding(index), result)

    def layer(self, call: Call, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        index = len(self.ran)
        self.ran.append(layer)
        arguments: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        entries = {self._entry_of[id(v)] for v in arguments.values() if id(v) in self._entry_of}
        self._handed.append(tuple(sorted(entries)))

        def enter(_path: Path, array: mx.array) -> mx.array:
            self._sinks.append((index, marked(array)))
            return self._source(FromInside(index), array)

        for key, value in arguments.items():
            if not self._holds_cache(value):
                arguments[key] = replace_arrays(value, enter)
        result = call(
            *(arguments[i] for i in range(len(args))), **{k: arguments[k] for k in kwargs}
        )

        outputs: dict[Path, tuple[int, int]] = {}

        def leave(path: Path, array: mx.array) -> mx.array:
            if (output := self._cache_outputs.get(id(array))) is not None:
                outputs[path] = output[1:]
            self._sinks.append((index, marked(array)))
            return self._source(FromResult(index, path), array)

        returned = {id(part) for part in (result, *(part for _, part in children(result)))}
        written = {
            key: value
            for key, value in arguments.items()
            if is_mutable(value) and id(value) not in returned and not self._holds_cache(value)
        }
        self._arguments.append(written)
        tree = replace_arrays((result, written), leave)
        self._results.append(_describe(tree, outputs))
        for entry in entries:
            replace_arrays(self.cache[entry], partial(self._cache_source, entry))
        return tree[0]

    def dataflow(self, layers: tuple[nn.Module, ...], logits: mx.array) -> Dataflow:
        self._sinks.append((len(layers), marked(logits)))
        dataflow = dependencies(self._sinks, self._sources)
        needs = [set(dataflow.get(layer, ())) for layer in range(len(layers) + 1)]
        for layer, entries in enumerate(self._handed):
            needs[layer] |= {FromCache(entry) for entry in entries}
        return Dataflow(
            layers=layers,
            cache_entries=tuple(self._handed),
            cache_count=len(self.cache),
            writers={entry: tuple(dict.fromkeys(w)) for entry, w in self._writers.items()},
            embeddings=tuple(self._embeddings),
            results=tuple(self._results),
            shared_arguments=self._shared_arguments(),
            needs=tuple(frozenset(sources) for sources in needs),
        )

    def _source(self, source: Source, array: mx.array) -> mx.array:
        array = marked(array)
        self._sources.append((source, array))
        return array

    def _cache_source(self, entry: int, _path: Path, array: mx.array) -> mx.array:
        return self._source(FromCache(entry), array)

    def _shared_arguments(self) -> tuple[int | str, ...]:
        """Arguments that are the identical object for all layers and can carry arrays."""
        first, *rest = self._arguments
        return tuple(
            key
            for key, value in first.items()
            if all(other.get(key) is value for other in rest)
            and (isinstance(value, dict | list) or any(True for _ in arrays(value)))
        )

    def _watch_updates(self, index: int, entry: Any) -> None:
        update = entry.update_and_fetch

        def update_and_fetch(*args: Any, **kwargs: Any) -> Any:
            outputs = update(*args, **kwargs)
            self._writers.setdefault(index, []).append(len(self.ran) - 1)
            for which, output in enumerate(outputs):
                self._cache_outputs[id(output)] = (output, index, which)
            return outputs

        replace_update(entry, update_and_fetch)

    def _holds_cache(self, value: Any) -> bool:
        return id(value) in self._entry_of or any(
            id(part) in self._entry_of for _, part in children(value)
        )


def _describe(tree: Any, outputs: dict[Path, tuple[int, int]]) -> Result:
    token_path, token_axis, dtype = None, 0, None
    token_bytes = {}
    for path, array in arrays(tree):
        token_bytes[path] = array.nbytes // (BATCH * TOKENS)
        axes = [i for i in range(array.ndim - 1) if array.shape[i : i + 2] == (BATCH, TOKENS)]
        if token_path is None and axes:
            token_path, token_axis, dtype = path, axes[0], array.dtype
    return Result(skeleton(tree), token_path, token_axis, dtype, token_bytes, outputs)


@contextmanager
def watched(modules: Sequence[nn.Module], watch: Callable[..., Any]) -> Iterator[None]:
    """Replaces the call of each module by `watch(call, module, args, kwargs)`."""
    classes = [(module, module.__class__) for module in modules]
    try:
        for module, _ in classes:
            replace_call(module, watch)
        yield
    finally:
        for module, base in classes:
            restore_class(module, base)


@contextmanager
def _marked_weights(
    model: nn.Module, modules: set[int], mark: Callable[[str, mx.array], mx.array]
) -> Iterator[None]:
    """Replaces each parameter of the modules (by id) by `mark(path, array)`."""
    kept = [
        (module, name, value)
        for _, module in model.named_modules()
        if id(module) in modules
        for name, value in direct_arrays(module)
    ]
    paths = {id(module): path for path, module in model.named_modules()}
    try:
        for module, name, value in kept:
            set_array(module, name, mark(paths[id(module)], value))
        yield
    finally:
        for module, name, value in kept:
            set_array(module, name, value)


def replace_call(module: nn.Module, replacement: Callable[..., Any]) -> None:
    """Gives one module another `__call__`; isinstance, attributes and submodules survive.

    `replacement(call, module, args, kwargs)` may use `call`, the module's own.
    """
    base = module.__class__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(partial(base.__call__, self), self, args, kwargs)

    override(module, __call__=call)
