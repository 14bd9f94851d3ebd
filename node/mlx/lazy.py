"""From a model's directory to a lazy mlx-lm model, quantized as asked. Nothing is read yet."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, load_model, quantize_model

from node.mlx.compat import literal_path, marked, model_classes, packed_floats
from node.mlx.graph import dependencies
from unicluster.checkpoints.checkpoint import WEIGHTS
from unicluster.checkpoints.safetensors import has_float8, read_header
from unicluster.checkpoints.small_files import INDEX, check_all_small_files
from unicluster.errors import InputError, UniclusterError, in_one_line

# For each weight by its name in the model, the tensors of the checkpoint that it is made of.
Origins = dict[str, frozenset[str]]

BITS = {"q2": 2, "q3": 3, "q4": 4, "q6": 6, "q8": 8}
GROUP_SIZE = 64


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights are still on disk."""

    model: nn.Module
    config: dict[str, Any]
    path: Path
    quant: str

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def load_lazy(path: Path, quant: str = "", origins: Origins | None = None) -> LazyModel:
    """Builds the model's mlx-lm class over lazy weights, quantized on load if `quant` says so.

    `origins` is filled, if given. Raises InputError with one line for whatever is wrong with the
    directory.
    """
    check_files(path)
    classes = model_classes if origins is None else _noting(origins)
    try:
        model, config = load_model(literal_path(path), lazy=True, get_model_classes=classes)
    except UniclusterError:
        raise
    except Exception as error:
        if unreadable := _unreadable(path):
            raise InputError(f"{path}: {unreadable}") from error
        raise InputError(f"{path}: {in_one_line(error)}") from error
    if packed_floats(model) and (unreadable := _unreadable(path)):
        raise InputError(f"{path}: {unreadable}")
    stored = stored_quant(config, model)
    if quant in ("", "none", stored):
        return LazyModel(model, config, path, stored)
    if "quantization" in config:
        raise InputError(
            f"{path}: its weights are already {stored}; --quant {quant} would need the "
            "unquantized checkpoint"
        )
    if quant not in BITS:
        raise InputError(f"no quantization {quant!r}: it is one of {', '.join(BITS)}")
    with contextlib.redirect_stdout(None):  # it prints, and standard output may be a protocol
        model, config = quantize_model(model, config, GROUP_SIZE, BITS[quant])
    return LazyModel(model, config, path, quant)


def _unreadable(path: Path) -> str:
    """Says that mlx-lm can't read the weights' format, if it is one of those that it may not."""
    config = load_config(path)
    text = config.get("text_config") or {}
    stored = config.get("quantization_config") or text.get("quantization_config") or {}
    method = str(stored.get("quant_method", "") if isinstance(stored, dict) else "")
    if not method and (path / "hf_quant_config.json").is_file():
        method = "modelopt"
    if not method and any(has_float8(file) for file in path.glob(WEIGHTS)):
        method = "fp8"
    if not method:
        return ""
    return (
        f"its weights are quantized as {method}, which mlx-lm can't read for "
        f"{config['model_type']}: use its bfloat16 weights, or a conversion for MLX"
    )


def check_files(path: Path) -> None:
    """Raises InputError naming the first file of a model that is missing or damaged."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory on this machine")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json in it, so this is no model directory")
    check_all_small_files(path)
    try:
        config = load_config(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'config.json'}: {in_one_line(error)}") from error
    if "model_type" not in config:
        raise InputError(f"{path / 'config.json'}: has no model_type")
    files = sorted(path.glob(WEIGHTS))
    if not files:
        raise InputError(f"{path}: no model*.safetensors in it")
    for file in files:
        read_header(file)
    _check_index(path)


def stored_quant(config: dict[str, Any], model: nn.Module) -> str:
    """Quantization of the stored weights: `q4`, or the dtype of most, such as `bfloat16`."""
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and "bits" in quantization:
        return f"q{quantization['bits']}"
    sizes: dict[str, int] = {}
    for _, array in tree_flatten(model.parameters()):
        name = str(array.dtype).removeprefix("mlx.core.")
        sizes[name] = sizes.get(name, 0) + array.nbytes
    return max(sizes, key=lambda name: sizes[name], default="none")


def load_parts(parts: Sequence[nn.Module]) -> Iterator[int]:
    """Reads the weights of one module after another; yields the bytes of each."""
    for part in parts:
        mx.eval(part.parameters())
        yield nbytes(part)


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def _check_index(path: Path) -> None:
    index = path / INDEX
    if not index.is_file():
        return
    names = set(json.loads(index.read_text())["weight_map"].values())
    for name in sorted(names):
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing, though the index names it")


def _noting(origins: Origins) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """Model classes that record how `sanitize` renames and joins tensors."""

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, arguments_class = model_classes(config)

        def build(arguments: Any) -> nn.Module:
            model: nn.Module = model_class(arguments)
            sanitize = getattr(model, "sanitize", lambda weights: weights)

            def note(weights: dict[str, mx.array]) -> dict[str, mx.array]:
                tensors = {name: marked(array) for name, array in weights.items()}
                sanitized: dict[str, mx.array] = sanitize(dict(tensors))
                origins.update(_origins(sanitized, tensors))
                return sanitized

            model.sanitize = note
            return model

        return build, arguments_class

    return classes


def _origins(weights: dict[str, mx.array], tensors: dict[str, mx.array]) -> Origins:
    names = {id(array): name for name, array in tensors.items()}
    as_they_are = {k: frozenset([names[id(w)]]) for k, w in weights.items() if id(w) in names}
    made = [(name, marked(w)) for name, w in weights.items() if name not in as_they_are]
    sources_by_name = dependencies(made, list(tensors.items())) if made else {}
    return as_they_are | {name: frozenset(sources) for name, sources in sources_by_name.items()}
