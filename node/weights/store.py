"""Where copies of models are on this machine: in the Hugging Face cache, and directories.

The copy of a model that is here only in part lies in the cache's folder of its repository, so that
the tools that list and delete cached models count it with the rest. A directory of another
machine has such a folder too, under a name of ours.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from node.weights.caches import OURS, folder, folders
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
from unicluster.checkpoints.names import Revision, is_file_name, is_revision
from unicluster.checkpoints.small_files import INDEX, damage
from unicluster.errors import NotFoundError, UnavailableError

DEMO = Path(__file__).parents[1] / "demo" / "model"

GIT_DIGITS = 40
READ_BYTES = 1 << 22
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
    return _of_directory(model, revision)


def offered(model: str, revision: str) -> Checkpoint | None:
    """The copy of a model that other machines may have: one in the cache, or the demo model.

    A directory of this machine is offered by whoever serves it, and by nobody else.
    """
    return _of_directory(model, revision) if Path(model).is_absolute() else find(model, revision)


def create(manifest: Manifest) -> Checkpoint:
    """A copy to be filled; files that are here already are linked into it.

    Raises UnavailableError where it can't be written.
    """
    root = _copy(manifest.model, manifest.revision)
    try:
        # Without it the tools for the cache call the folder damaged.
        (folder(manifest.model) / "snapshots").mkdir(parents=True, exist_ok=True)
        _note(manifest, [ref for ref in _refs(manifest.model) if not ref.exists()])
        checkpoint = Checkpoint.create(root, manifest)
        _link_snapshot(checkpoint)
    except OSError as error:
        raise UnavailableError(
            f"{root}: can't be written: {error.strerror}; set HF_HOME to a directory that can"
        ) from error
    return checkpoint


def damaged(checkpoint: Checkpoint) -> str:
    """A small file of a copy that is damaged, with the reason; empty where there is none."""
    names = (name for name in checkpoint.manifest.small if (checkpoint.root / name).is_file())
    files = (checkpoint.root / name for name in names)
    return next((f"{file}: damaged: {reason}" for file in files if (reason := _damage(file))), "")


def damaged_in_cache(model: str, revision: str) -> str:
    """A damaged small file of a model in the cache, with the reason; empty where there is none."""
    commit = revision or _newest(model)
    for each in folders(model) if commit else ():
        for file in sorted((each / "snapshots" / Revision(commit)).glob("*")):
            if is_small(file.name) and (reason := _damage(file)):
                return f"{file}: damaged: {reason}"
    return ""


def distrust_damaged(checkpoint: Checkpoint) -> None:
    """Small files of a copy that are not what they should be count as missing from now on."""
    if not checkpoint.is_partial:
        return
    for name in checkpoint.manifest.small:
        path, expected = checkpoint.root / name, checkpoint.manifest.files[name].checksum
        if not checkpoint.is_whole(name) or not _damage(path):
            continue
        # What the hub itself has so, it can't give otherwise.
        if not expected or checksum(path, expected) != expected:
            checkpoint.distrust(name)


def checksum(file: Path, like: str) -> str:
    """Checksum of the same kind as `like`: SHA-256, or git's SHA-1 of a blob; empty if it is."""
    if not like:
        return ""
    blob = len(like) == GIT_DIGITS
    digest = hashlib.sha1(usedforsecurity=False) if blob else hashlib.sha256()
    if blob:
        digest.update(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _damage(file: Path) -> str:
    """Why a small file can't be used; empty where it can."""
    try:
        stat = file.stat()
        return _damage_of(file, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except OSError as error:
        return f"it can't be read: {error.strerror}"


@lru_cache(maxsize=256)
def _damage_of(file: Path, *_stamp: int) -> str:
    return damage(file)


def _copy(model: str, revision: str) -> Path:
    """Directory of the copy: in a repository of GGUFs, one for each quantization."""
    _, quant = split_id(model)
    named = Revision(revision)
    return folder(model) / OURS / (f"{named}-{quant}" if quant else named)


def _of_directory(model: str, revision: str) -> Checkpoint | None:
    """The copy of another machine's directory."""
    checkpoint = Checkpoint.open(_copy(model, revision)) if revision else None
    if checkpoint is not None:
        distrust_damaged(checkpoint)
    return checkpoint


def _of_repository(model: str, revision: str) -> Checkpoint | None:
    if not revision:
        return None
    checkpoint = Checkpoint.open(_copy(model, revision)) or _from_read_only(model, revision)
    if checkpoint is not None:
        distrust_damaged(checkpoint)
        _link_snapshot(checkpoint)
        return checkpoint
    manifest = _of_snapshot(model, revision)
    return create(manifest) if manifest is not None else None


def _from_read_only(model: str, revision: str) -> Checkpoint | None:
    """A copy with the whole files of one in a cache that was writable once."""
    shared, _ = folders(model)
    if folder(model) == shared:
        return None
    copy = Checkpoint.open(shared / OURS / _copy(model, revision).name)
    if copy is None:
        return None
    checkpoint = create(copy.manifest)
    for name in copy.manifest.files:
        if copy.is_whole(name) and not checkpoint.is_whole(name):
            checkpoint.link(name, copy.root / name)
    return checkpoint


def set_newest(manifest: Manifest) -> None:
    """Notes what a repository's main branch is, for when the hub can't be asked."""
    _note(manifest, _refs(manifest.model))


def _note(manifest: Manifest, refs: list[Path]) -> None:
    for ref in refs:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(manifest.revision)


def _newest(model: str) -> str:
    refs = [*_refs(model), *_refs(model, folders(model)[0])]
    noted = (ref.read_text(errors="replace").strip() for ref in refs if ref.is_file())
    return next(filter(is_revision, noted), "")


def _refs(model: str, where: Path | None = None) -> list[Path]:
    """Files in which the newest commit is noted.

    A quantization has its own note, for there may be newer commits that it was not fetched of.
    """
    root, (_, quant) = where or folder(model), split_id(model)
    main = root / "refs" / "main"
    return [root / OURS / "refs" / quant, main] if quant else [main]


def _of_snapshot(model: str, revision: str) -> Manifest | None:
    """Manifest of a snapshot that another program fetched; None if something is missing from it,
    or damaged.
    """
    manifests = (_of_one_snapshot(model, revision, each) for each in folders(model))
    return next((manifest for manifest in manifests if manifest is not None), None)


def _of_one_snapshot(model: str, revision: str, root: Path) -> Manifest | None:
    snapshot = root / "snapshots" / Revision(revision)
    present = {
        name: file
        for file in sorted(snapshot.rglob("*"))
        if file.is_file() and is_file_name(name := file.relative_to(snapshot).as_posix())
    }
    if any(is_small(name) and _damage(file) for name, file in present.items()):
        return None
    _, quant = split_id(model)
    if quant:
        try:
            names = [*filter(is_small, present), *chosen(model, present)]
        except NotFoundError:
            return None
    else:
        names = [name for name in present if is_wanted(name)]
        index = present.get(INDEX)
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
    for each in folders(manifest.model):
        snapshot = each / "snapshots" / manifest.revision
        for name, file in manifest.files.items():
            whole = snapshot / name
            if (checkpoint.root / (name + UNVERIFIED)).exists() or checkpoint.is_whole(name):
                continue
            if not whole.is_file() or whole.stat().st_size != file.size:
                continue
            if is_weights(name) or not _damage(whole):
                checkpoint.link(name, whole)
