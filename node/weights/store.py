"""Where copies of models are on this machine: in the Hugging Face cache, and directories.

The copy of a model that is here only in part lies in the cache's folder of its repository, so that
the tools that list and delete cached models count it with the rest. A directory of another
machine has such a folder too, under a name of ours.
"""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import constants

from node.weights.hub_compat import repository_folder
from unicluster.checkpoints.checkpoint import (
    Checkpoint,
    File,
    Manifest,
    is_small,
    is_wanted,
    is_weights,
)
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf_names import chosen, split_id
from unicluster.checkpoints.names import ModelName, Revision, is_file_name, is_revision
from unicluster.errors import NotFoundError

DEMO = Path(__file__).parents[1] / "demo" / "model"

OURS = "unicluster"
_STAGES = f"models--*/{OURS}/stages/**"
# Characters of the name of a repository: the hub's own limit has room for an owner, and more.
MOST_NAME = 64
# A file that was being fetched and has not been verified.
UNVERIFIED = ".part"


def find(model: str, revision: str) -> Checkpoint | None:
    """The copy of a model on this machine, perhaps a partial one; None where there is none.

    An empty `revision` means a directory as it is, or what a repository's main branch was when
    it was last asked for.
    """
    path = DEMO if model == "demo" else Path(model)
    if not path.is_absolute():
        return _of_repository(model, revision or _newest(model))
    if path.exists():
        here = whole(path)
        if revision in ("", here.manifest.revision):
            return here
    return Checkpoint.open(_copy(model, revision)) if revision else None


def offered(model: str, revision: str) -> Checkpoint | None:
    """The copy of a model that other machines may have: one in the cache, or the demo model.

    A directory of this machine is offered by whoever serves it, and by nobody else.
    """
    if Path(model).is_absolute():
        return Checkpoint.open(_copy(model, revision)) if revision else None
    return find(model, revision)


def create(manifest: Manifest) -> Checkpoint:
    """A copy to be filled; files that are here already are linked into it."""
    # Without it the tools for the cache call the folder damaged.
    (folder(manifest.model) / "snapshots").mkdir(parents=True, exist_ok=True)
    _note(manifest, [ref for ref in _refs(manifest.model) if not ref.exists()])
    checkpoint = Checkpoint.create(_copy(manifest.model, manifest.revision), manifest)
    _link_snapshot(checkpoint)
    return checkpoint


def folder(model: str) -> Path:
    """A model's folder in the cache: that of its repository. Raises InputError for no name."""
    repo, _ = split_id(ModelName(model))
    if Path(model).is_absolute():
        repo = f"{OURS}/{_repository_name(model)}"
    return Path(constants.HF_HUB_CACHE) / repository_folder(repo)


def _repository_name(path: str) -> str:
    """A directory's name, or one that a repository may have: another for each path."""
    name = Path(path).name
    words = re.findall(r"[A-Za-z0-9_]+", name)
    plain = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._]+", "-", name)).strip("-.")
    if plain == name and len(name) <= MOST_NAME and not name.endswith(".git"):
        return name
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    return "-".join(["-".join(words)[:MOST_NAME], digest]).lstrip("-")


def stages(model: str) -> Path:
    """Directory of the files that are made from a model for one stage."""
    return folder(model) / OURS / "stages" / split_id(model)[1]


def unused_stages() -> list[Path]:
    """Files made for stages of any model, those first that were used longest ago."""
    folder = Path(constants.HF_HUB_CACHE)
    files = [
        file for pattern in ("*.gguf", "*.part") for file in folder.glob(f"{_STAGES}/{pattern}")
    ]
    return sorted(files, key=_last_used)


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # removed meanwhile
        return 0.0


def _copy(model: str, revision: str) -> Path:
    """Directory of the copy: in a repository of GGUFs, one for each quantization."""
    _, quant = split_id(model)
    named = Revision(revision)
    return folder(model) / OURS / (f"{named}-{quant}" if quant else named)


def _of_repository(model: str, revision: str) -> Checkpoint | None:
    if not revision:
        return None
    checkpoint = Checkpoint.open(_copy(model, revision))
    if checkpoint is not None:
        _link_snapshot(checkpoint)
        return checkpoint
    manifest = _of_snapshot(model, revision)
    return create(manifest) if manifest is not None else None


def set_newest(manifest: Manifest) -> None:
    """Notes what a repository's main branch is, for when the hub can't be asked."""
    _note(manifest, _refs(manifest.model))


def _note(manifest: Manifest, refs: list[Path]) -> None:
    for ref in refs:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(manifest.revision)


def _newest(model: str) -> str:
    noted = (ref.read_text(errors="replace").strip() for ref in _refs(model) if ref.is_file())
    return next(filter(is_revision, noted), "")


def _refs(model: str) -> list[Path]:
    """Files in which the newest commit is noted.

    A quantization has its own note, for there may be newer commits that it was not fetched of.
    """
    main, (_, quant) = folder(model) / "refs" / "main", split_id(model)
    return [folder(model) / OURS / "refs" / quant, main] if quant else [main]


def _of_snapshot(model: str, revision: str) -> Manifest | None:
    """Manifest of a snapshot that another program fetched; None if something is missing."""
    snapshot = folder(model) / "snapshots" / Revision(revision)
    present = {
        name: file
        for file in sorted(snapshot.rglob("*"))
        if file.is_file() and is_file_name(name := file.relative_to(snapshot).as_posix())
    }
    _, quant = split_id(model)
    if quant:
        try:
            names = [*filter(is_small, present), *chosen(model, present)]
        except NotFoundError:
            return None
    else:
        names = [name for name in present if is_wanted(name)]
        index = present.get("model.safetensors.index.json")
        named = json.loads(index.read_text())["weight_map"].values() if index else ()
        needed = {"config.json", *named}
        if not needed <= present.keys() or not any(map(is_weights, names)):
            return None
    files = {name: File(present[name].stat().st_size, _checksum(present[name])) for name in names}
    return Manifest(model, revision, files)


def _checksum(file: Path) -> str:
    """The hub's checksum, which names the blob that a link in a snapshot leads to; else empty."""
    name = file.resolve().name if file.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else ""


def _link_snapshot(checkpoint: Checkpoint) -> None:
    """Links whole files that are in the ordinary cache by now into the copy."""
    manifest = checkpoint.manifest
    snapshot = folder(manifest.model) / "snapshots" / manifest.revision
    for name, file in manifest.files.items():
        whole = snapshot / name
        if (checkpoint.root / (name + UNVERIFIED)).exists() or checkpoint.is_whole(name):
            continue
        if whole.is_file() and whole.stat().st_size == file.size:
            checkpoint.link(name, whole)
