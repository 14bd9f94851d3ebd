"""Undocumented behaviour of MLX and of mlx-lm's loader that the code relies on.

One function a piece, and a contract test for each (tests/unit/test_compat.py) that fails when a
new version changes it; pyproject.toml has the versions that passed. Caches: compat_caches.py.
"""

import contextlib
import functools
import glob
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import _infer_tool_parser
from mlx_lm.utils import _get_classes

from unicluster.system.versions import advice, installed

log = logging.getLogger(__name__)

# Elements of the array by which writing into MLX's memory is tried: 16 KiB, as a hidden state has.
TRIAL_SIZE = 4096
MLX_LM = "mlx-lm"


# --- models


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes for a config.json: the model's, and that of its arguments.

    Raises ValueError for a `model_type` that mlx-lm has no module for, with mlx-lm's version.
    """
    try:
        model_class, arguments_class = _get_classes(config)
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        missing = f"{installed(MLX_LM)} has no model type {str(config['model_type'])[:80]}"
        raise ValueError(f"{missing}: {advice(MLX_LM)}") from error
    return model_class, arguments_class


class _LiteralPath(type(Path())):  # type: ignore[misc]  # the platform's kind of Path
    """A path that `open` takes as it is, and whose text `glob` takes as it is."""

    def __str__(self) -> str:
        return str(Path(glob.escape(str(Path(super().__str__()).parent))) / self.name)

    def __fspath__(self) -> str:
        return str(Path(super().__str__()))


def literal_path(path: Path) -> Path:
    """`path` for mlx-lm's `load_model`, which has `glob` look for weights by the path's text: so
    that `[`, `*` and `?` in it stand for themselves.
    """
    literal: Path = _LiteralPath(path)
    return literal


def packed_floats(model: nn.Module) -> bool:
    """Whether a layer that isn't quantized has bytes for weights: as MLX loads floats of 8 bits."""
    plain = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    return any(module.weight.dtype == mx.uint8 for module in plain)


def direct_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's direct arrays by attribute name, without those of its submodules."""
    return [(name, value) for name, value in module.items() if isinstance(value, mx.array)]


def set_array(module: nn.Module, name: str, array: mx.array) -> None:
    """Replaces one of a module's direct arrays."""
    module[name] = array


def drop_array(module: nn.Module, name: str) -> None:
    """Removes one of a module's direct arrays, so that its memory is freed."""
    del module[name]


def override(instance: Any, **methods: Callable[..., Any]) -> None:
    """Gives one module or cache other methods, also those that Python looks up on the class.

    Its class becomes a subclass of the same name: isinstance, attributes and submodules survive.
    """
    base = type(instance)
    instance.__class__ = type(base.__name__, (base,), methods)


def restore_class(instance: Any, base: type) -> None:
    """Undoes `override`."""
    instance.__class__ = base


def bound_gathers(model: nn.Module) -> None:
    """Keeps a model's gathers by rows that another layer chose within the array they read.

    Such rows come from another machine, and MLX reads beyond an array without a word. The one
    module that has them is deepseek_v41, in its `_gather_rows`: values (batch, rows, dims), indices
    (batch, tokens, chosen), -1 for none. Changes nothing where all indices are rows.
    """
    module: Any = sys.modules[type(model).__module__]
    gather = getattr(module, "_gather_rows", None)
    if gather is None or getattr(gather, "is_bounded", False):
        return

    def bounded(values: mx.array, indices: mx.array) -> mx.array:
        rows = values.shape[1]
        if not rows:
            return mx.zeros((*indices.shape, values.shape[2]), values.dtype)
        gathered: mx.array = gather(values, mx.minimum(indices, rows - 1))
        return gathered

    bounded.is_bounded = True  # type: ignore[attr-defined]  # a mark on a function
    module._gather_rows = bounded


# --- tokenizers


def inferred_tool_parser(tokenizer: Any) -> str:
    """The module of mlx_lm.tool_parsers that fits a tokenizer's template; empty if none does."""
    return str(_infer_tool_parser(tokenizer) or "")


# --- batches


def decoding_rows(generator: Any, cache: Any) -> tuple[int, ...]:
    """The sequences of a BatchGenerator's decode step, row by row, as `insert` numbered them.

    Empty where `cache` is not that of its decode step, as in a sequence's first.
    """
    batch = generator._generation_batch
    return tuple(batch.uids) if cache is batch.prompt_cache else ()


def pending_choice(generator: Any, number: int) -> tuple[int, mx.array] | None:
    """A BatchGenerator's token for a sequence that its next step will return, not fed yet.

    With its log-probabilities (vocabulary,). None before the sequence's first step.
    """
    batch = generator._generation_batch
    if number not in batch.uids:
        return None
    row = batch.uids.index(number)
    token: Any = batch._next_tokens[row].item()
    return int(token), batch._next_logprobs[row]


# --- random numbers


def number_drawn(seed: int) -> float:
    """The number in [0, 1) by which `mx.random.categorical` draws just after that seed."""
    mx.random.seed(seed)
    number: Any = mx.random.uniform().item()
    return float(number)


@functools.cache
def draws_one_number() -> bool:
    """Whether `mx.random.categorical` takes the class at one number's place among all, in order.

    Other versions may add noise to each class.
    """
    weights = np.arange(1, 65, dtype=np.float64)
    ends = np.cumsum(weights) / weights.sum()
    logits = mx.log(mx.array(weights.astype(np.float32)))[None]
    for seed in range(16):
        number = number_drawn(seed)
        if np.abs(ends - number).min() > 1e-5:
            mx.random.seed(seed)
            drawn: Any = mx.random.categorical(logits).item()
            if drawn != np.searchsorted(ends, number, side="right"):
                return False
    return True


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """On a CPU: functions of `mx.compile` called meanwhile run as they are written.

    A compiled function has the numbers it was called with in its kernel, such as a temperature,
    and a CPU's kernels are made by a C++ compiler: a second or more, and everything waits, for
    each number that is new.
    """
    if mx.default_device() != mx.cpu or "MLX_DISABLE_COMPILE" in os.environ:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


# --- the lazy graph


class Node(NamedTuple):
    """A primitive of the lazy graph. A compiled function is announced each time it runs."""

    name: str


class Edge(NamedTuple):
    """An array or primitive, and what has it as its input."""

    before: str
    after: str


def marked(array: mx.array) -> mx.array:
    """A copy of an array as a separate node of the lazy graph, where it can be recognised."""
    return mx.stop_gradient(array)


def lazy_graph(arrays: Mapping[str, mx.array]) -> Iterator[Node | Edge]:
    """The graph that unevaluated arrays are to be computed by, inputs before outputs.

    Arrays that are in `arrays` have the names they have there. Nothing is evaluated. The form of
    what mx.export_to_dot writes is not documented.
    """
    dot = io.StringIO()
    mx.export_to_dot(dot, **arrays)
    for line in dot.getvalue().splitlines():
        before, arrow, after = (part.strip('"') for part in line.partition(" -> "))
        if arrow:
            yield Edge(before, after)
        elif "[label" in line:
            yield Node(line.strip("{ ").partition(" ")[0])


def is_evaluated(array: mx.array) -> bool:
    """False for an array that is still to be computed."""
    return not any(isinstance(part, Edge) for part in lazy_graph({"array": array}))


# --- memory


def separate(array: mx.array) -> mx.array:
    """A second Python object of an array's contents: in-place updates don't reach the other.

    Shares memory until one of them is written to.
    """
    return array.__copy__()


def memory(array: mx.array) -> memoryview:
    """The bytes of an array, which is evaluated for it; MLX's type stubs lack the protocol."""
    buffer: Any = array
    return memoryview(buffer)


def writable_memory(array: mx.array) -> memoryview:
    """Memory of an evaluated array, to be written to before what depends on it is evaluated.

    Raises ValueError where MLX gives out read-only memory. See `writes_reach_device`.
    """
    view = memory(array)
    if view.readonly:
        raise ValueError("MLX's memory can't be written to here")
    return view


@functools.cache
def writes_reach_device() -> bool:
    """Whether MLX computes with bytes that were written into an array's memory.

    Nothing in MLX promises it: on the backend at hand it is tried, once a process, with a small
    product built before its input is written.
    """
    try:
        reached = _try_write()
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        log.debug("writing into MLX's memory ahead of a step: %s", error)
        return False
    outcome = "reaches" if reached else "does not reach"
    log.debug("writing into MLX's memory %s %s", outcome, mx.default_device())
    return reached


def _try_write() -> bool:
    values = np.arange(TRIAL_SIZE, dtype=np.float32)
    raw = mx.array(np.zeros(values.nbytes, np.uint8))
    view = writable_memory(raw)
    built_ahead = 2 * raw.view(mx.float32).reshape(1, -1) + 1
    view[:] = values.tobytes()
    return bool(np.array_equal(np.array(built_ahead)[0], 2 * values + 1))
