"""One lazy run of the whole model, to learn how its forward uses layers and caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from unicluster.errors import StageError


@dataclass(frozen=True)
class Embedding:
    """An embedding outside the layers, and what it gives."""

    module: nn.Module
    dims: int
    dtype: mx.Dtype


@dataclass(frozen=True)
class Trace:
    """How a forward pass goes.

    layers: the layers in the order they run, each once.
    cache_entries: for each layer, the indices in the cache list that it was handed.
    embeddings: the embedding modules that ran outside the layers.
    """

    layers: tuple[nn.Module, ...]
    cache_entries: tuple[tuple[int, ...], ...]
    embeddings: tuple[Embedding, ...]


def trace(model: nn.Module, model_type: str) -> Trace:
    """Follows a two-token prompt through `model` without evaluating anything.

    Raises StageError, by name, when layers don't run once each and in order: such a
    model can't be cut.
    """
    layers = tuple(model.layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if id(m) not in inside]
    embeddings = [m for m in outside if hasattr(m, "as_linear")]
    cache = make_prompt_cache(model)
    calls: list[tuple[nn.Module, tuple[int, ...]]] = []
    embedded: list[Embedding] = []

    def on_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handed = {id(value) for value in (*args, *kwargs.values())}
        calls.append((layer, tuple(i for i, c in enumerate(cache) if id(c) in handed)))

    def on_embedding(module: nn.Module, result: mx.array) -> None:
        embedded.append(Embedding(module, result.shape[-1], result.dtype))

    with _watched(layers, before=on_layer), _watched(embeddings, after=on_embedding):
        model(mx.zeros((1, 2), mx.int32), cache=cache)
    if [id(layer) for layer, _ in calls] != [id(layer) for layer in layers]:
        raise StageError(
            f"{model_type}: its layers don't run once each and in order, so it can't be cut "
            "into stages; run it on one machine"
        )
    return Trace(layers, tuple(entries for _, entries in calls), tuple(embedded))


@contextmanager
def _watched(modules: Any, *, before: Any = None, after: Any = None) -> Iterator[None]:
    """Calls `before(module, args, kwargs)` and `after(module, result)` around each call."""
    classes = [(module, module.__class__) for module in modules]

    def watch(base: type) -> type:
        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if before is not None:
                before(self, args, kwargs)
            result = base.__call__(self, *args, **kwargs)
            if after is not None:
                after(self, result)
            return result

        return type(base.__name__, (base,), {"__call__": __call__})

    try:
        for module, base in classes:
            module.__class__ = watch(base)
        yield
    finally:
        for module, base in classes:
            module.__class__ = base
