"""Damage to the small files beside the weights, seen before anything is made of them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unicluster.errors import InputError, in_one_line

INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
# Defaults of sampling in it.
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
# A file that was never written to its end often has its length, and zeros in place of its bytes.
LOOKED_AT = 4096


def damage(file: Path) -> str:
    """Why a small file can't be what its name says; empty where it can, also if it is not known.

    Raises OSError where it can't be read.
    """
    check = _CHECKS.get(file.name)
    if check is None and file.suffix not in (".tiktoken", ".jinja"):
        return ""
    with file.open("rb") as stream:
        start = stream.read(LOOKED_AT)
    if not start.strip(b"\0"):
        return "it has nothing but zeros in it" if start else "it is empty"
    if check is None:
        return ""
    try:
        check(file)
    except RecursionError:
        return "it is nested too deeply"
    except (ValueError, UnicodeError) as error:
        return in_one_line(error)
    return ""


def check_small_files(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError naming the first of some files that is damaged or can't be read."""
    for name in sorted(names):
        file = folder / name
        try:
            reason = damage(file) if file.is_file() else ""
        except OSError as error:
            raise InputError(f"{file}: can't be read: {error.strerror}") from error
        if reason:
            raise InputError(f"{file}: damaged: {reason}; copy it again")


def check_all_small_files(folder: Path) -> None:
    """Raises InputError naming the first file of a model's directory that is damaged."""
    others = (file.name for pattern in ("*.tiktoken", "*.jinja") for file in folder.glob(pattern))
    check_small_files(folder, {*_CHECKS, *others})


def _object(file: Path) -> dict[str, Any]:
    loaded = json.loads(file.read_bytes())
    if not isinstance(loaded, dict):
        raise ValueError("it is no object of JSON")
    return loaded


def _generation_config(file: Path) -> None:
    loaded = _object(file)
    for name in NUMBERS:
        if not _is_number(loaded.get(name, 0)):
            raise ValueError(f"{name} is {loaded[name]!r}, and no number")
    if not isinstance(loaded.get("do_sample"), bool | None):
        raise ValueError(f"do_sample is {loaded['do_sample']!r}, neither true nor false")
    _check_end_tokens(loaded)


def _config(file: Path) -> None:
    loaded = _object(file)
    if not isinstance(loaded.get("model_type", ""), str):
        raise ValueError(f"model_type is {loaded['model_type']!r}, and no text")
    _check_end_tokens(loaded)


def _check_end_tokens(loaded: dict[str, Any]) -> None:
    ends = loaded.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [0 if ends is None else ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in listed):
        raise ValueError(f"eos_token_id is {ends!r}, and no number or list of numbers")


def _index(file: Path) -> None:
    files = _object(file).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError("its weight_map names no files")


def _tokenizer(file: Path) -> None:
    if not isinstance(_object(file).get("model"), dict):
        raise ValueError("there is no tokenizer in it")


def _tokenizer_config(file: Path) -> None:
    loaded = _object(file)
    if not isinstance(loaded.get("chat_template"), str | list | dict | None):
        raise ValueError("its chat_template is no text")


def _any(file: Path) -> None:
    """Nothing is known of its contents."""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


_CHECKS: dict[str, Callable[[Path], object]] = {
    "config.json": _config,
    GENERATION_CONFIG: _generation_config,
    INDEX: _index,
    "hf_quant_config.json": _object,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "special_tokens_map.json": _object,
    "added_tokens.json": _object,
    "vocab.json": _object,
    "chat_template.json": _object,
    "merges.txt": _any,
    "vocab.txt": _any,
    "tokenizer.model": _any,
}
