"""What is in a model directory, and a fingerprint by which other machines know the same files."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from unicluster.checkpoint import Checkpoint, File, Manifest, is_wanted, is_weights
from unicluster.errors import InputError
from unicluster.safetensors import LENGTH_BYTES, header_length

# Of a file of weights its header and some samples are read: all of 400 GB would take minutes.
SAMPLES = 16
SAMPLE_BYTES = 4096


def whole_directory(path: Path) -> Checkpoint:
    """A directory as it is, with nothing missing. Its files must not change while in use.

    Raises InputError when it can't be read.
    """
    try:
        files = sorted(file for file in path.iterdir() if is_wanted(file.name) and file.is_file())
        stamps = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        fingerprint = _fingerprint(path, stamps)
    except OSError as error:
        raise InputError(f"{error.filename or path}: can't be read: {error.strerror}") from error
    sizes = {name: File(size) for name, size, _ in stamps}
    return Checkpoint(path, Manifest(str(path), fingerprint, sizes))


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
    header = header_length(start) if len(start) == LENGTH_BYTES else 0
    digest.update(os.pread(descriptor, min(header, size), 0))
    for index in range(SAMPLES):
        at = header + (size - header) * index // SAMPLES
        digest.update(os.pread(descriptor, SAMPLE_BYTES, at))
