"""Where copies of models are on this machine: in the Hugging Face cache, and directories.

Of a model that is here in part, the copy lies in the cache's folder of its repository, so that
the tools that list and delete cached models count it with the rest. A directory of another
machine has such a folder too, under a name of our own.
"""

import json
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from unicluster.checkpoint import Checkpoint, File, Manifest, is_wanted, is_weights
from unicluster.fingerprint import whole

DEMO = Path(__file__).parent / "demo" / "model"

OURS = "unicluster"
# A file that was being fetched and has not been verified.
UNVERIFIED = ".part"


def find(model: str, revision: str) -> Checkpoint | None:
    """The copy of a model on this machine, as far as there is one.

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
    return Checkpoint.open(folder(model) / OURS / revision) if revision else None


def offered(model: str, revision: str) -> Checkpoint | None:
    """The same for other machines, which must know what is in a directory to be given it."""
    return find(model, revision) if revision or not Path(model).is_absolute() else None


def create(manifest: Manifest) -> Checkpoint:
    """A copy to be filled, with what is here already."""
    where = folder(manifest.model)
    # Without it the tools for the cache call the folder damaged.
    (where / "snapshots").mkdir(parents=True, exist_ok=True)
    if not _newest(manifest.model):
        set_newest(manifest)
    checkpoint = Checkpoint.create(where / OURS / manifest.revision, manifest)
    _link_snapshot(checkpoint)
    return checkpoint


def folder(model: str) -> Path:
    """A model's folder in the cache."""
    if Path(model).is_absolute():
        model = f"{OURS}/{re.sub(r'[^A-Za-z0-9._]+', '-', Path(model).name)}"
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")


def _of_repository(repo: str, revision: str) -> Checkpoint | None:
    if not revision:
        return None
    checkpoint = Checkpoint.open(folder(repo) / OURS / revision)
    if checkpoint is not None:
        _link_snapshot(checkpoint)
        return checkpoint
    manifest = _of_snapshot(repo, revision)
    return create(manifest) if manifest is not None else None


def set_newest(manifest: Manifest) -> None:
    """Notes what a repository's main branch is, for when the hub can't be asked."""
    (refs := folder(manifest.model) / "refs").mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(manifest.revision)


def _newest(repo: str) -> str:
    try:
        return (folder(repo) / "refs" / "main").read_text().strip()
    except OSError:
        return ""


def _of_snapshot(repo: str, revision: str) -> Manifest | None:
    """What another program fetched, if nothing is missing."""
    snapshot = folder(repo) / "snapshots" / revision
    if not (snapshot / "config.json").is_file():
        return None
    files = {
        file.name: File(file.stat().st_size, _checksum(file))
        for file in sorted(snapshot.iterdir())
        if is_wanted(file.name) and file.is_file()
    }
    index = snapshot / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
    if not any(map(is_weights, files)) or not set(named) <= set(files):
        return None
    return Manifest(repo, revision, files)


def _checksum(file: Path) -> str:
    """The hub's: it is the name of the blob that a link in a snapshot leads to."""
    name = file.resolve().name if file.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else ""


def _link_snapshot(checkpoint: Checkpoint) -> None:
    """Takes up whole files that are in the ordinary cache by now."""
    manifest = checkpoint.manifest
    snapshot = folder(manifest.model) / "snapshots" / manifest.revision
    for name, file in manifest.files.items():
        whole = snapshot / name
        if (checkpoint.root / (name + UNVERIFIED)).exists() or checkpoint.is_whole(name):
            continue
        if whole.is_file() and whole.stat().st_size == file.size:
            checkpoint.link(name, whole)
