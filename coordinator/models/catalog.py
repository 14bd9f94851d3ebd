"""The models people ask for by name, and where their weights are."""

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from coordinator.planning.engines import for_checkpoint
from unicluster.checkpoints.checkpoint import GGUF, is_gguf
from unicluster.checkpoints.gguf_names import is_quant, model_id, split_id
from unicluster.command_line import beginning
from unicluster.errors import InputError, NotFoundError

QUANTS = ("q2", "q3", "q4", "q6", "q8", "none")
# What a catalogue name means when no quantization is asked for: what most machines can hold.
DEFAULT_QUANT = "q4"

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Entry:
    """A catalogue model: its original repository, and the MLX ones known, by quantization.

    recipes: how an MLX repository was quantized, where it is not all weights alike.
    """

    id: str
    aliases: tuple[str, ...]
    hf: str
    mlx: dict[str, str]
    recipes: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases, self.hf.split("/")[1])

    @property
    def config(self) -> dict[str, Any]:
        """The facts of the original repository's config.json that say what the model is."""
        config: dict[str, Any] = _configs()[self.id]["config"]
        return config

    @property
    def quants(self) -> tuple[str, ...]:
        """Quantizations that can be requested: weights that are quantized already stay so."""
        stored = "quantization_config" in self.config
        return (*self.recipes, "none") if stored else QUANTS


@dataclass(frozen=True)
class Source:
    """A model to load: `model` and `quant` as in StageSpec; `display` is for people.

    `model` is "demo", an absolute directory or a hub repository, `owner/name:q4_k_m` of one of
    GGUFs. `quant` is what is still to be applied on load: empty when the weights are taken as
    they are stored.
    """

    model: str
    quant: str
    display: str
    # Whether another quantization could be had: of a catalogue model there are others.
    quants: bool = field(default=False, compare=False)


@cache
def entries() -> tuple[Entry, ...]:
    text = resources.files("coordinator.models").joinpath("catalog.json").read_text("utf-8")
    return tuple(
        Entry(row["id"], tuple(row["aliases"]), row["hf"], row["mlx"], row.get("recipes", {}))
        for row in json.loads(text)
    )


@cache
def _configs() -> dict[str, Any]:
    text = resources.files("coordinator.models").joinpath("configs.json").read_text("utf-8")
    return {row["id"]: row for row in json.loads(text)}


def model_names(text: str) -> Iterable[str]:
    """The names that begin with `text`, for a shell that completes them."""
    return beginning(lambda: ["demo", *(entry.id for entry in entries())])(text)


def find(name: str) -> Entry | None:
    """The catalogue model that a person calls so."""
    return _by_name().get(_key(name))


def resolve(name: str, quant: str | None = None) -> Source:
    """Finds what a person means by a model's name.

    `demo`, a catalogue name, a directory, or a hub repository `owner/name`, in this order; a
    directory with a catalogue's name is reached as `./NAME`. `quant` is one of QUANTS; None
    takes weights as they are stored, and DEFAULT_QUANT for a catalogue name. For a repository
    of GGUFs it may also be one of theirs, which can be a part of the name: `owner/name:Q4_K_M`.

    Raises InputError for a bad quantization or directory, NotFoundError for an unknown name.
    """
    name, quant = name.strip(), quant and quant.lower()
    if (source := _of_ggufs(name, quant)) is not None:
        return source
    if name.lower().endswith(GGUF) and quant not in (None, "none"):
        raise InputError(f"--quant {quant}: {name} is a GGUF, whose weights stay as they are")
    if quant is not None and quant not in QUANTS:
        raise InputError(
            f"no quantization {quant!r}: it is one of {', '.join(QUANTS)}; for a GGUF name its "
            "repository, such as owner/name:q4_k_m"
        )
    applied = "" if quant in (None, "none") else str(quant)
    if not name:
        raise InputError("no model named: give demo, a catalogue name, a directory or owner/name")
    if name == "demo":
        return Source("demo", applied, _display("demo", applied))
    if entry := _by_name().get(_key(name)):
        return _catalogued(entry, quant or DEFAULT_QUANT)
    path = Path(os.path.expanduser(name))
    if _is_local(name):
        return Source(_checked(path), applied, _display(Path(os.path.abspath(path)).name, applied))
    if _REPO.fullmatch(name):
        return Source(name, applied, _display(name, applied))
    raise NotFoundError(_unknown(name))


def checked_engine(source: Source, engine: str) -> Source:
    """The source itself. Raises InputError unless that engine, or auto, can compute it."""
    gguf = is_gguf(source.model)
    wanted = for_checkpoint(gguf=gguf).name
    if engine not in ("auto", wanted):
        kind = "a GGUF" if gguf else "no GGUF"
        raise InputError(f"--engine {engine}: {source.display} is {kind}, which {wanted} computes")
    return source


def _of_ggufs(name: str, quant: str | None) -> Source | None:
    """A repository of GGUFs; None if the quantization does not name one."""
    repo, tag = split_id(name)
    wanted = tag.lower() or quant or ""
    if not _REPO.fullmatch(repo) or _is_local(name) or not (tag or is_quant(wanted)):
        return None
    if not tag and wanted in QUANTS:
        return None  # to be quantized here
    if not is_quant(wanted):
        raise InputError(f"{name}: {tag} is no quantization of a GGUF, such as q4_k_m")
    if quant not in (None, wanted):
        raise InputError(f"--quant {quant}: {name} says {tag} already; leave one of them out")
    return Source(model_id(repo, wanted), "", _display(repo, wanted))


def _catalogued(entry: Entry, quant: str) -> Source:
    display = _display(entry.id, "" if quant == "none" else quant)
    others = len(entry.quants) > 2
    if quant in entry.mlx:
        return Source(entry.mlx[quant], "", display, others)
    return Source(entry.hf, "" if quant == "none" else quant, display, others)


def _display(name: str, quant: str) -> str:
    return f"{name} {quant}" if quant else name


@cache
def _by_name() -> dict[str, Entry]:
    return {_key(name): entry for entry in entries() for name in entry.names}


def _key(name: str) -> str:
    """Letters, digits and dots: people differ in case and in what they put between."""
    return re.sub(r"[^a-z0-9.]", "", name.lower()) if "/" not in name else ""


def _is_local(name: str) -> bool:
    """Whether a directory or a GGUF on this machine is meant, be it there or not."""
    path = Path(os.path.expanduser(name))
    return _looks_like_path(name) or os.path.isdir(path) or name.lower().endswith(GGUF)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _checked(path: Path) -> str:
    """The absolute path of a model's directory, or of a GGUF, that can be read."""
    try:
        if not path.exists():
            raise InputError(f"no {'file' if is_gguf(path.name) else 'directory'} {path}")
        if is_gguf(path.name) and path.is_file():
            path.open("rb").close()
            return os.path.abspath(path)
        if not path.is_dir():
            raise InputError(f"{path} is a file: give the model's directory, or a .gguf")
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"{path} has no config.json: it is not a model's directory")
        os.listdir(path)
        config.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {error.filename or path}: {error.strerror}") from error
    return os.path.abspath(path)


def _unknown(name: str) -> str:
    by_key = {_key(n): entry.id for entry in entries() for n in entry.names}
    keys = difflib.get_close_matches(_key(name), by_key, n=5, cutoff=0.5)
    close = list(dict.fromkeys(by_key[key] for key in keys))[:3]
    known = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"no model {name!r}: {known}A model is demo, a catalogue name such as "
        f"{entries()[0].id}, a directory, or a hub repository owner/name"
    )
