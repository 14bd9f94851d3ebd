"""Steps foreseen: built before their input is there, so that only evaluating is left.

A decode step's input is known in all but its values. So the step is built on arrays whose bytes
are written when they come, and on twins of the caches, which take the caches' place if the step
comes as foreseen; if another comes, twins and step are let go, and nothing has happened.
"""

import copy
import io
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from node.mlx.cache_view import Caches
from node.mlx.tensors import DTYPES, NAMES
from node.mlx.tree import is_object
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
        view = _memory(raw)
        if view.readonly:
            raise ValueError("MLX's memory can't be written to here")
        self._views.append(view)
        self._arrays.append(raw.view(dtype).reshape(leaf.shape))
        return self._arrays[-1]

    @property
    def is_untouched(self) -> bool:
        """False once something that was computed from it has been evaluated."""
        return all(_is_lazy(array) for array in self._arrays)

    def fill(self, leaves: Iterable[Leaf]) -> None:
        """Takes the bytes of a tree of the same kind."""
        for view, leaf in zip(self._views, leaves, strict=True):
            if view is not None:
                view[:] = leaf.tensor.data

    def fill_one(self, array: mx.array) -> None:
        """Takes the values of an array of the same kind; evaluates it."""
        (view,) = filter(None, self._views)
        view[:] = _memory(array).tobytes()


class Step:
    """One step over some caches, built on a blank of the kind of its input."""

    def __init__(self, kind: Kind, caches: Caches, build: Build) -> None:
        """Raises what building raises, and ValueError if it looked at values not yet there."""
        self.kind = kind
        self.blank = Blank(kind)
        self.after = twins(caches)
        self.result, self.extra = build(self.blank.tree, self.after)
        if not self.blank.is_untouched:
            raise ValueError("the model looks at its input while the step is built")


class Foresight:
    """Builds steps, unless the model or the machine turns out not to allow it."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled

    def step(self, kind: Kind, caches: Caches, build: Build) -> Step | None:
        """The step, or None if it can't be built before its input is there."""
        if not self._enabled:
            return None
        try:
            return Step(kind, caches, build)
        except Exception as error:
            # If this step ever comes it is built the usual way, and then the error is told.
            log.info("steps are not built ahead: %s", error)
            self._enabled = False
            return None


def take_place(caches: Caches, after: Caches) -> None:
    """Makes caches what their twins have become."""
    for cache, twin in zip(caches, after, strict=True):
        cache.__dict__ = twin.__dict__


def twins(caches: Caches) -> Caches:
    """Caches of the same content, each to go its own way, at no cost in memory."""
    seen: dict[int, mx.array] = {}
    return [_twin(cache, seen) for cache in caches]


def _twin(value: Any, seen: dict[int, mx.array]) -> Any:
    # What mlx-lm writes into a cache's array, Python sees in the same object: each needs its own.
    if isinstance(value, mx.array):
        if id(value) not in seen:
            seen[id(value)] = value.__copy__()
        return seen[id(value)]
    if value is None or isinstance(value, int | float | str):
        return value
    if type(value) in (list, tuple):
        return type(value)(_twin(part, seen) for part in value)
    if type(value) is dict:
        return {key: _twin(part, seen) for key, part in value.items()}
    if is_object(value):
        new = object.__new__(type(value))
        vars(new).update({name: _twin(part, seen) for name, part in vars(value).items()})
        return new
    return copy.deepcopy(value)


def _memory(array: Any) -> memoryview:
    return memoryview(array)  # MLX's stubs don't tell that arrays are buffers


def _is_lazy(array: mx.array) -> bool:
    dot = io.StringIO()
    mx.export_to_dot(dot, array=array)
    return "->" in dot.getvalue()
