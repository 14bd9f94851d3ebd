"""Prebuilt decode steps: the graph is built before its input arrives, and then only evaluated.

Shape and dtype of a decode step's input are known before its values. The step is built on
placeholder arrays, into which the values are written later, and on shadow caches. If the input is
as expected the shadows are committed; otherwise shadows and step are dropped without any effect.
"""

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from node.mlx import compat
from node.mlx.compat_caches import Caches, shadow
from node.mlx.tensors import DTYPES, NAMES
from unicluster.v1.tensor_pb2 import Leaf

log = logging.getLogger(__name__)

Build = Callable[[Any, Caches], tuple[Any, list[Any]]]


class LeafKind(NamedTuple):
    """Key, dtype and shape of one leaf of a tree; a plain value, as JSON, in `json`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    json: str


Kind = tuple[LeafKind, ...]


def kind_of_leaves(leaves: Iterable[Leaf]) -> Kind:
    """The kind of a tree on the wire: keys, dtypes, shapes and plain values, without the bytes."""
    return tuple(
        LeafKind(leaf.key, leaf.tensor.dtype, tuple(leaf.tensor.shape), leaf.json)
        for leaf in leaves
    )


def kind_of_array(array: mx.array) -> Kind:
    """The kind of a tree that is one array."""
    return (LeafKind("", NAMES[array.dtype], tuple(array.shape), ""),)


class PlaceholderInput:
    """A step's input before it is known: a tree of evaluated arrays whose bytes come later.

    Raises ValueError or TypeError where MLX's memory can't be written to.
    """

    def __init__(self, kind: Kind) -> None:
        self._views: list[memoryview | None] = []
        self._arrays: list[mx.array] = []
        self.tree: Any = tree_unflatten([(leaf.key, self._leaf(leaf)) for leaf in kind])

    def _leaf(self, leaf: LeafKind) -> Any:
        if not leaf.dtype:
            self._views.append(None)
            return json.loads(leaf.json)
        dtype = DTYPES[leaf.dtype]
        size = dtype.size
        for length in leaf.shape:
            size *= length
        raw = mx.array(np.zeros(size, np.uint8))
        self._views.append(compat.writable_memory(raw))
        self._arrays.append(raw.view(dtype).reshape(leaf.shape))
        return self._arrays[-1]

    @property
    def is_untouched(self) -> bool:
        """False once something computed from it has been evaluated."""
        return not any(map(compat.is_evaluated, self._arrays))

    def fill(self, leaves: Iterable[Leaf]) -> None:
        """Writes the bytes of a tree of the same kind."""
        for view, leaf in zip(self._views, leaves, strict=True):
            if view is not None:
                view[:] = leaf.tensor.data

    def fill_array(self, array: mx.array) -> None:
        """Writes the values of one array of the same kind, which is evaluated."""
        (view,) = filter(None, self._views)
        view[:] = compat.memory(array).tobytes()


class PrebuiltStep:
    """One step over some caches, built on a placeholder input.

    shadows: the caches after the step; `compat_caches.commit` makes them the real ones.
    """

    def __init__(self, kind: Kind, caches: Caches, build: Build) -> None:
        """Raises ValueError if the model evaluates its input, and any error of `build`."""
        self.kind = kind
        self.placeholder = PlaceholderInput(kind)
        self.shadows = shadow(caches)
        self.result, self.extra = build(self.placeholder.tree, self.shadows)
        if not self.placeholder.is_untouched:
            raise ValueError("the model evaluates its input while the step is built")


class StepBuilder:
    """Prebuilds steps, until the model or MLX's backend turns out not to allow it."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled

    def build(self, kind: Kind, caches: Caches, build: Build) -> PrebuiltStep | None:
        """The step, or None if it can't be built before its input arrives."""
        if not (self._enabled and compat.writes_reach_device()):
            return None
        try:
            return PrebuiltStep(kind, caches, build)
        except Exception as error:
            # The step itself is then built the usual way, and raises the error there.
            log.info("decode steps are not prebuilt: %s", error)
            self._enabled = False
            return None
