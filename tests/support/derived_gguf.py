"""Tiny GGUFs of any architecture, of what llama.cpp itself asks for.

An attempt to load a file without a tensor, a key or the right shape ends in an error that names
it: so a file is derived, error by error, of nothing but the architecture's name and some sizes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from node.ggml.library import Complaint, llama
from tests.support.tiny_gguf import add_tokenizer

MOST_ATTEMPTS = 600

_NO_KEY = re.compile(r"key not found in model: [\w-]+\.([\w.]+)")
_NO_TENSOR = re.compile(r"(?:missing tensor '([\w.-]+)'|tensor '([\w.-]+)' not found)")
_SHAPE = re.compile(r"tensor '([\w.-]+)' has wrong shape; expected ([\d, ]+), got")
_COUNT = re.compile(r"wrong number of tensors; expected (\d+), got (\d+)")


# Shapes that llama.cpp ends the process for, where they are not as it wants.
_FIRST = {("laguna", "attn_gate.weight"): (4, 64)}


class NotDerivedError(Exception):
    """llama.cpp asks for something that is not known here."""


class SuperfluousError(NotDerivedError):
    """There is a tensor that llama.cpp does not read."""


@dataclass
class Derived:
    """Metadata of the architecture, and shapes (rows first, as numpy has them) by name."""

    architecture: str
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def derive(
    file: Path,
    architecture: str,
    metadata: dict[str, Any],
    values: dict[str, Any],
    optional: Sequence[str] = (),
    further: Sequence[str] = (),
    later: Mapping[str, Any] | None = None,
) -> Derived:
    """`metadata`: as it is to be; `values`: of keys that are added where llama.cpp asks for them.

    optional: names of a layer's tensors that llama.cpp can do without, such as `attn_q.bias`; each
    layer that may have them has them. further: names of tensors as they are in the file; with the
    first of them the metadata `later` is added, of layers that llama.cpp can do without, too.

    Raises NotDerivedError where llama.cpp takes no such file.
    """
    made = Derived(architecture, dict(metadata))
    made.shapes["token_embd.weight"] = (1, 1)
    _complete(file, made, values)
    made.metadata |= later or {}
    for name in further:
        if name not in made.shapes:
            made.shapes[name] = (1,)
            _complete(file, made, values)
    for name in optional:
        for layer in range(int(metadata["block_count"])):
            shapes = dict(made.shapes)
            made.shapes[f"blk.{layer}.{name}"] = (1,)
            try:
                _complete(file, made, values)
            except SuperfluousError:
                made.shapes = shapes
    return made


def _complete(file: Path, made: Derived, values: dict[str, Any]) -> None:
    """Adds what llama.cpp asks for, until it loads the file."""
    architecture = made.architecture
    known: dict[str, tuple[int, ...]] = {}
    for _ in range(MOST_ATTEMPTS):
        reason = _attempt(file, made)
        if not reason:
            return
        if match := _NO_KEY.search(reason):
            if match[1] not in values:
                raise NotDerivedError(f"{architecture}: no value for {match[1]}")
            made.metadata[match[1]] = values[match[1]]
        elif match := _NO_TENSOR.search(reason):
            name = match[1] or match[2]
            suffix = name.split(".", 2)[-1]
            made.shapes[name] = known.get(suffix) or _FIRST.get((architecture, suffix), (1,))
        elif match := _SHAPE.search(reason):
            sizes = tuple(int(size) for size in match[2].split(","))[::-1]
            while len(sizes) > 1 and sizes[0] == 1:
                sizes = sizes[1:]
            made.shapes[match[1]] = sizes
            if match[1].startswith("blk."):
                known[match[1].split(".", 2)[-1]] = sizes
        elif _COUNT.search(reason):
            raise SuperfluousError(f"{architecture}: {reason}")
        else:
            raise NotDerivedError(f"{architecture}: {reason}")
    raise NotDerivedError(f"{architecture}: no end")


def _attempt(file: Path, made: Derived) -> str:
    """llama.cpp's error; empty once the file is loaded."""
    write(file, made, {name: np.zeros(shape, kind_of(name)) for name, shape in made.shapes.items()})
    lib = llama()
    params = lib.llama_model_default_params()
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    with Complaint() as complaint:
        model = lib.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        return complaint.reason or "no reason"
    lib.llama_model_free(model)
    return ""


def kind_of(name: str) -> type[np.generic]:
    return np.int32 if "tid2eid" in name else np.float32


def write(file: Path, made: Derived, weights: dict[str, Any], tokenizer: bool = False) -> None:
    """tokenizer: that of tests.support.tiny; else none."""
    writer = gguf.GGUFWriter(str(file), made.architecture)
    for key, value in made.metadata.items():
        prefix = "" if key.startswith("xielu.") else f"{made.architecture}."
        add(writer, prefix + key, value)
    if tokenizer:
        add_tokenizer(writer)
    else:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
