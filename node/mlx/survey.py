"""Survey of the checkpoint's tensors that each stage needs, from the model's own code.

A checkpoint's tensors are not a model's weights: `sanitize` renames, splits and joins them. Some
modules outside the layers are needed on later stages too. Both are read off MLX's lazy graph, so
that the checkpoint's headers are enough.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from node.mlx.dataflow import Dataflow, FromWeight, trace_dataflow
from node.mlx.lazy import LazyModel, Origins, load_lazy


@dataclass(frozen=True)
class Survey:
    """layers: the tensors of each layer. outside: those of each other module, by its path."""

    lazy: LazyModel
    dataflow: Dataflow
    layers: tuple[frozenset[str], ...]
    outside: dict[str, frozenset[str]]

    def of_stage(self, start: int, end: int, has_lm_head: bool = False) -> frozenset[str]:
        """Tensors that the layers [start, end) need; stage 0 has all outside the layers too.

        `has_lm_head`: with those of the final norm and the lm_head.
        """
        modules = set(self.outside)
        if start > 0:
            needs = frozenset[object]().union(*self.dataflow.needs[start : end + has_lm_head])
            modules &= {source.module for source in needs if isinstance(source, FromWeight)}
        parts = [*self.layers[start:end], *(self.outside[module] for module in modules)]
        return frozenset().union(*parts)


def survey(path: Path, quant: str = "") -> Survey:
    """Surveys a checkpoint, of which only configuration and headers need be here.

    Raises InputError or StageError.
    """
    origins: Origins = {}
    lazy = load_lazy(path, quant, origins)
    dataflow = trace_dataflow(lazy.model, lazy.model_type)
    owners = _owners(lazy.model, dataflow.layers)
    layers: list[set[str]] = [set() for _ in dataflow.layers]
    outside: dict[str, set[str]] = {}
    for name, tensors in origins.items():
        module = name
        while module not in owners:
            module = module.rpartition(".")[0]
        for layer in owners[module]:
            layers[layer] |= tensors
        if not owners[module]:
            outside.setdefault(module, set()).update(tensors)
    return Survey(
        lazy,
        dataflow,
        tuple(map(frozenset, layers)),
        {module: frozenset(tensors) for module, tensors in outside.items()},
    )


def _owners(model: nn.Module, layers: tuple[nn.Module, ...]) -> dict[str, list[int]]:
    """The layers that each module, by its path, is a part of."""
    inside: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        for part in {id(part) for part in layer.modules()}:
            inside.setdefault(part, []).append(index)
    return {path: inside.get(id(module), []) for path, module in model.named_modules()}
