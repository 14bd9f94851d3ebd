"""From a model's directory to a lazy mlx-lm model, quantized as asked. Nothing is read yet."""

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, load_model, quantize_model

from unicluster.errors import InputError, NotFoundError, UniclusterError

DEMO = Path(__file__).parent / "demo" / "model"
BITS = {"q2": 2, "q3": 3, "q4": 4, "q6": 6, "q8": 8}
GROUP_SIZE = 64

# Characters: mlx names every weight that is missing, and there may be thousands.
LONGEST_REASON = 300


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


def load_lazy(path: Path, quant: str = "") -> LazyModel:
    """Builds the model's mlx-lm class over lazy weights, quantized on load if `quant` says so.

    Raises InputError or NotFoundError with one line for whatever is wrong with the directory.
    """
    check_files(path)
    try:
        model, config = load_model(path, lazy=True)
    except UniclusterError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {_in_one_line(error)}") from error
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


def model_path(model: str) -> Path:
    """Where a model's files are on this machine: the demo, a directory, or the hub's cache."""
    if model == "demo":
        return DEMO
    path = Path(model).expanduser()
    if path.is_absolute() or path.exists():
        return path
    return _from_hub(model)


def check_files(path: Path) -> None:
    """Raises InputError naming the first file of a model that is missing or damaged."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory on this machine")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json in it, so this is no model directory")
    try:
        config = load_config(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'config.json'}: {_in_one_line(error)}") from error
    if "model_type" not in config:
        raise InputError(f"{path / 'config.json'}: has no model_type")
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{path}: no model*.safetensors in it")
    for file in files:
        check_safetensors(file)
    _check_index(path)


def check_safetensors(file: Path) -> None:
    """Raises InputError unless the header is readable and the file as long as it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(stream.read(length))
            end = max(
                (entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"),
                default=0,
            )
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged safetensors: {_in_one_line(error)}") from error
    if 8 + length + end != size:
        raise InputError(
            f"{file}: damaged safetensors: {size} bytes instead of {8 + length + end}; "
            "copy it again"
        )


def stored_quant(config: dict[str, Any], model: nn.Module) -> str:
    """What the weights are as stored: `q4`, or the dtype of most of them, such as `bfloat16`."""
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
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: damaged: {_in_one_line(error)}") from error
    for name in sorted(names):
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing, though the index names it")


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    def download(**options: Any) -> Path:
        patterns = [p for p in DEFAULT_ALLOW_PATTERNS if p != "*.py"]
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))

    return _explained(
        download,
        {
            GatedRepoError: f"{repo}: gated; accept its terms on the hub and set HF_TOKEN",
            RepositoryNotFoundError: f"{repo}: no such repository on the hub (or HF_TOKEN lacks)",
            HFValidationError: f"{repo}: neither a directory here nor a valid repository id",
            LocalEntryNotFoundError: f"{repo}: not in this machine's cache, and the hub can't be "
            "reached; connect it, or copy the model here and give its directory",
        },
        repo,
    )


def _explained(action: Callable[[], Path], reasons: dict[type[Exception], str], repo: str) -> Path:
    try:
        return action()
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise NotFoundError(reason) from error
    except OSError as error:
        raise NotFoundError(f"{repo}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
