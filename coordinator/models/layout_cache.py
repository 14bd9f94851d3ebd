"""Layouts that were computed from configurations before, cached in unicluster's folder.

Computing one takes seconds, most of them imports of MLX; a person asks for the same model with one
fleet after another. A layout depends on the request and on the code that computes it, and on
nothing else.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from unicluster import __version__
from unicluster.program import ROOT
from unicluster.trust.store import default_folder
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

log = logging.getLogger(__name__)

FOLDER = "layouts"
MOST_FILES = 256
DIGEST_BYTES = 32  # of the rest of a file, before it
_LIBRARIES = ("mlx", "mlx-lm", "transformers", "gguf", "llama-cpp-python")

Compute = Callable[[Sequence[InspectRequest]], Sequence[ModelLayout]]


def layouts(requests: Sequence[InspectRequest], compute: Compute) -> list[ModelLayout]:
    """The layout for each request; those with a config.json are looked for in the cache.

    `compute` is called at most once, with the others. Raises what it raises.
    """
    folder, code = default_folder() / FOLDER, _code()
    paths = [folder / _key(request, code) if request.config_json else None for request in requests]
    cached = [_read(path) if path is not None else None for path in paths]
    missing = [request for request, layout in zip(requests, cached, strict=True) if layout is None]
    computed = iter(compute(missing) if missing else ())
    answers = []
    for path, layout in zip(paths, cached, strict=True):
        if layout is None:
            layout = next(computed)
            if path is not None:
                _write(path, layout)
        answers.append(layout)
    return answers


def _code() -> str:
    """Names the version of all that computes layouts, changes that nobody has released too."""
    versions = []
    for library in _LIBRARIES:
        try:
            versions.append(metadata.version(library))
        except metadata.PackageNotFoundError:
            versions.append("none")
    newest = max((p.stat().st_mtime_ns for p in (ROOT / "node").rglob("*.py")), default=0)
    return " ".join([__version__, *versions, str(newest)])


def _key(request: InspectRequest, code: str) -> str:
    asked = request.SerializeToString(deterministic=True)
    return hashlib.sha256(code.encode() + b"\0" + asked).hexdigest()


def _read(path: Path) -> ModelLayout | None:
    """None for one that is not cached, or is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.info("%s: computed again: %s", path, error)
        return None
    digest, encoded = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(encoded).digest() != digest:
        log.info("%s: computed again: it is damaged", path)
        return None
    return ModelLayout.FromString(encoded)


def _write(path: Path, layout: ModelLayout) -> None:
    """Writes a layout to the cache, in place of the oldest where there are too many."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".layout-", dir=path.parent)
        with open(descriptor, "wb") as file:
            encoded = layout.SerializeToString()
            file.write(hashlib.sha256(encoded).digest() + encoded)
        os.replace(temporary, path)
        files = sorted(path.parent.iterdir(), key=lambda other: other.stat().st_mtime_ns)
        for old in files[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.info("the layout is computed again next time: %s", error)
