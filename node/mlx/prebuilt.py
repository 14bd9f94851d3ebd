"""Prebuilt decode steps: the graph is built before the input is there, and then only evaluated.

A decode step's input is known in all but its values. So the step is built on placeholder arrays
whose bytes are written when they come, and on shadow caches, which are committed if the step comes
as expected; if another comes, shadows and step are dropped, and nothing has happened.
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
    """A leaf of a tree, but for an array's bytes. Plain values are in `json`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    json: str


Kind = tuple[LeafKind, ...]


def kind_of_leaves(leaves: Iterable[Leaf]) -> Kind:
    """What a tree on the wire has in common with those to come."""
    return tuple(
        LeafKind(leaf.key, leaf.tensor.dtype, tuple(leaf.tensor.shape), leaf.json)
        for leaf in leaves
    )


def kind_of_array(array: mx.array) -> Kind:
    """The kind of a tree that is one array."""
    return (LeafKind("", NAMES[array.dtype], tuple(array.shape), ""),)


class Blank:
    """A tree of evaluated arrays whose bytes can be written later.

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
        """False once something that was computed from it has been evaluated."""
        return not any(map(compat.is_evaluated, self._arrays))

    def fill(self, leaves: Iterable[Leaf]) -> None:
        """Takes the bytes of a tree of the same kind."""
        for view, leaf in zip(self._views, leaves, strict=True):
            if view is not None:
                view[:] = leaf.tensor.data

    def fill_one(self, array: mx.array) -> None:
        """Takes the values of an array of the same kind; evaluates it."""
        (view,) = filter(None, self._views)
        view[:] = compat.memory(array).tobytes()


class Step:
    """One step over some caches, built on a blank of the kind of its input."""

    def __init__(self, kind: Kind, caches: Caches, build: Build) -> None:
        """Raises what building raises, and ValueError if it looked at values not yet there."""
        self.kind = kind
        self.blank = Blank(kind)
        self.after = shadow(caches)
        self.result, self.extra = build(self.blank.tree, self.after)
        if not self.blank.is_untouched:
            raise ValueError("the model looks at its input while the step is built")


class Foresight:
    """Builds steps, unless the model or MLX's backend turns out not to allow it."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled

    def step(self, kind: Kind, caches: Caches, build: Build) -> Step | None:
        """The step, or None if it can't be built before its input is there."""
        if not (self._enabled and compat.writes_reach_device()):
            return None
        try:
            return Step(kind, caches, build)
        except Exception as error:
            # If this step ever comes it is built the usual way, and then the error is told.
            log.info("steps are not built ahead: %s", error)
            self._enabled = False
            return None
