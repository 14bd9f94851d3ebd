"""Files of a model directory, and the fingerprint by which machines compare them."""

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path

from unicluster.checkpoints.checkpoint import (
    Checkpoint,
    File,
    Manifest,
    is_gguf,
    is_small,
    is_wanted,
    is_weights,
)
from unicluster.checkpoints.gguf_names import parts
from unicluster.checkpoints.safetensors import LENGTH_BYTES, MOST_HEADER_BYTES, header_length
from unicluster.errors import InputError

log = logging.getLogger(__name__)

# Of a file of weights its header and some samples are read: all of 400 GB would take minutes.
SAMPLES = 16
SAMPLE_BYTES = 4096


def whole(path: Path) -> Checkpoint:
    """A directory or a GGUF as it is. Raises InputError when it can't be read."""
    return whole_gguf(path) if is_gguf(path.name) and path.is_file() else whole_directory(path)


def whole_gguf(path: Path) -> Checkpoint:
    """A GGUF, with all its parts if it was split, and the tokenizer's files if they lie beside it.

    Raises InputError when it can't be read or a part is missing.
    """
    names, folder = parts(path.name), path.parent
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, though {path.name} is a part of the same")
    try:
        if (folder / "tokenizer_config.json").is_file():
            files = sorted(folder.iterdir())
            names += [file.name for file in files if is_small(file.name) and _belongs(file)]
        return _as_it_is(str(path), folder, names)
    except OSError as error:
        raise InputError(f"{error.filename or path}: can't be read: {error.strerror}") from error


def whole_directory(path: Path) -> Checkpoint:
    """A directory as it is, with nothing missing. Its files must not change while in use.

    Raises InputError when it can't be read.
    """
    try:
        files = sorted(file for file in path.iterdir() if _belongs(file) and is_wanted(file.name))
        return _as_it_is(str(path), path, [file.name for file in files])
    except OSError as error:
        raise InputError(f"{error.filename or path}: can't be read: {error.strerror}") from error


def _belongs(file: Path) -> bool:
    """Whether it is a file that may be given to others: no link leads out of its directory.

    In the Hugging Face cache a snapshot's links lead to the blobs of the same repository.
    """
    if not file.is_file():
        return False
    if not file.is_symlink():
        return True
    target, folder = file.resolve(), file.parent.resolve()
    roots = [folder, folder.parents[1] / "blobs"] if _is_snapshot(folder) else [folder]
    inside = any(target.is_relative_to(root) for root in roots)
    if not inside:
        log.warning("%s leads out of its directory, so it is left out: copy it there", file)
    return inside


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def _as_it_is(model: str, folder: Path, names: list[str]) -> Checkpoint:
    stats = [(name, (folder / name).stat()) for name in names]
    stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    sizes = {name: File(size) for name, size, _ in stamps}
    return Checkpoint(folder, Manifest(model, _fingerprint(folder, stamps), sizes))


@lru_cache(maxsize=8)
def _fingerprint(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in stamps:
        digest.update(f"{name} {size}\n".encode())
        with (path / name).open("rb") as stream:
            if is_weights(name):
                _add_samples(digest, stream.fileno(), size)
            else:
                digest.update(stream.read())
    return digest.hexdigest()[:40]


def _add_samples(digest: "hashlib._Hash", descriptor: int, size: int) -> None:
    start = os.pread(descriptor, LENGTH_BYTES, 0)
    known = len(start) == LENGTH_BYTES and not start.startswith(b"GGUF")
    header = header_length(start) if known else 0
    digest.update(os.pread(descriptor, min(header, size, MOST_HEADER_BYTES), 0))
    for index in range(SAMPLES):
        at = header + (size - header) * index // SAMPLES
        digest.update(os.pread(descriptor, SAMPLE_BYTES, at))
