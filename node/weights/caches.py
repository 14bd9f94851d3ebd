"""The folders of models on this machine: in the Hugging Face cache; and where that is read-only, in
a cache of ours for what has to be written.
"""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import constants

from node.weights.hub_compat import repository_folder
from node.weights.made import PART
from unicluster.checkpoints.gguf_names import split_id
from unicluster.checkpoints.names import ModelName

OURS = "unicluster"
# Characters of the name of a repository: the hub's own limit has room for an owner, and more.
MOST_NAME = 64
_STAGES = f"models--*/{OURS}/stages/**"


def folder(model: str) -> Path:
    """The folder of a model that may be written to. Raises InputError for no name of a model."""
    shared, ours = folders(model)
    return shared if _writable(shared) and _writable(shared / OURS) else ours


def folders(model: str) -> tuple[Path, Path]:
    """A model's folders in the Hugging Face cache and in ours, whether they are there or not."""
    name = _name(model)
    return Path(constants.HF_HUB_CACHE) / name, _ours() / name


def stages(model: str) -> Path:
    """Directory of the files that are made from a model for one stage."""
    return folder(model) / OURS / "stages" / split_id(model)[1]


def unused_stages() -> list[Path]:
    """Files made for stages of any model, those first that were used longest ago."""
    caches = (Path(constants.HF_HUB_CACHE), _ours())
    patterns = (f"{_STAGES}/*{kind}" for kind in (".gguf", PART))
    found = {file for pattern in patterns for cache in caches for file in cache.glob(pattern)}
    return sorted(found, key=_last_used)


def _ours() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / OURS / "hub"


def _writable(path: Path) -> bool:
    """Whether this process may write there, or make the directory."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # removed meanwhile
        return 0.0


def _name(model: str) -> str:
    repo, _ = split_id(ModelName(model))
    if Path(model).is_absolute():
        repo = f"{OURS}/{_repository_name(model)}"
    return repository_folder(repo)


def _repository_name(path: str) -> str:
    """A directory's name, or one that a repository may have: another for each path."""
    name = Path(path).name
    words = re.findall(r"[A-Za-z0-9_]+", name)
    plain = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._]+", "-", name)).strip("-.")
    if plain == name and len(name) <= MOST_NAME and not name.endswith(".git"):
        return name
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    return "-".join(["-".join(words)[:MOST_NAME], digest]).lstrip("-")
