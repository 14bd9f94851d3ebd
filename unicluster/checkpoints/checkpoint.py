"""The files of a model on a machine: all of them, or the parts that its stages need.

A partial copy is a directory that mlx-lm can load: files that are here in full, and sparse ones
of full length with only the bytes of some tensors. Beside a sparse file lies one that lists
those bytes; they are listed when they are verified and on the disk.
"""

import fnmatch
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from unicluster.checkpoints.gguf_names import split_id
from unicluster.checkpoints.names import FileName, ModelName, Revision, is_file_name
from unicluster.checkpoints.ranges import Range, Ranges, merged, without
from unicluster.errors import InputError, shown

log = logging.getLogger(__name__)

WEIGHTS = "model*.safetensors"
GGUF = ".gguf"
# Files that mlx-lm reads beside the weights: never *.py, which is other people's code.
SMALL_FILES = ("*.json", "*.jsonl", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model")

MANIFEST = ".manifest.json"
LIST = ".held"  # added to a sparse file's name


# Nothing is as large: the largest models have a few terabytes, in many files.
MOST_BYTES = 1 << 50
MOST_FILES = 4096

_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}|")


@dataclass(frozen=True)
class File:
    """checksum: the hub's, a SHA-256 or a git blob's SHA-1; empty where none is known.

    Raises InputError for a size or checksum that no file has.
    """

    size: int
    checksum: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MOST_BYTES:
            raise InputError(f"invalid size of a file: {self.size} bytes")
        if not _CHECKSUM.fullmatch(self.checksum):
            raise InputError(f"invalid checksum of a file: {shown(self.checksum)}")


@dataclass(frozen=True)
class Manifest:
    """All files of a model that are of use here.

    model: see ModelName. revision: see Revision. files: by FileName. Raises InputError where one
    of them is invalid, whoever said so.
    """

    model: str
    revision: str
    files: Mapping[str, File]

    def __post_init__(self) -> None:
        ModelName(self.model)
        Revision(self.revision)
        if len(self.files) > MOST_FILES:
            raise InputError(f"{self.model}: {len(self.files)} files, and at most {MOST_FILES}")
        for name in self.files:
            FileName(name)

    @property
    def weights(self) -> list[str]:
        return sorted(name for name in self.files if is_weights(name))

    @property
    def small(self) -> list[str]:
        return sorted(name for name in self.files if not is_weights(name))


def is_weights(name: str) -> bool:
    return fnmatch.fnmatch(name, WEIGHTS) or name.lower().endswith(GGUF)


def is_gguf(name: str) -> bool:
    """Whether a file is a GGUF, or a model is one: `owner/name:quant`."""
    return name.lower().endswith(GGUF) or split_id(name)[1] != ""


def is_small(name: str) -> bool:
    """Whether a file is of those beside the weights."""
    known = any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)
    return known and "/" not in name and is_file_name(name)


def is_wanted(name: str) -> bool:
    """Whether a file of a repository or directory belongs to the model; GGUFs are apart."""
    return is_small(name) or ("/" not in name and fnmatch.fnmatch(name, WEIGHTS))


class Checkpoint:
    """A copy of a model's files in `root`, in full or in part. Several processes may share it."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def create(cls, root: Path, manifest: Manifest) -> "Checkpoint":
        """A partial copy, with the bytes that are already there of these files."""
        root.mkdir(parents=True, exist_ok=True)
        checkpoint = cls(root, manifest)
        checkpoint._write(root / MANIFEST, json.dumps(asdict(manifest)).encode())
        return checkpoint

    @classmethod
    def open(cls, root: Path) -> "Checkpoint | None":
        """The partial copy in `root`, if there is one whose manifest can be read."""
        try:
            fields = json.loads((root / MANIFEST).read_bytes())
            files = {name: File(**file) for name, file in fields["files"].items()}
            return cls(root, Manifest(fields["model"], fields["revision"], files))
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, AttributeError, InputError) as error:
            log.warning("%s: damaged, so the copy beside it is not used: %s", root, error)
            return None

    @property
    def is_partial(self) -> bool:
        """Whether it is a copy that may be written to, and not somebody's directory."""
        return (self.root / MANIFEST).is_file()

    def available(self, name: str) -> Ranges:
        """The bytes of a file that are here and verified."""
        file, length = self._path(name), self.manifest.files[name].size
        if not file.exists() or file.stat().st_size != length:
            return ()
        try:
            lines = self._list(name).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return merged([(0, length)])
        parts = (_range(line) for line in lines)
        return merged(part for part in parts if part is not None and part[1] <= length)

    def missing(self, name: str, wanted: Ranges) -> Ranges:
        """The bytes of `wanted` that are not here."""
        return without(wanted, self.available(name))

    def is_whole(self, name: str) -> bool:
        """Whether all of a file is here."""
        return not self.missing(name, self.all_of(name)) and self._path(name).exists()

    def all_of(self, name: str) -> Ranges:
        return merged([(0, self.manifest.files[name].size)])

    def read(self, name: str, start: int, end: int) -> bytes:
        """Raises InputError when the file is too short."""
        with self._path(name).open("rb") as stream:
            data = os.pread(stream.fileno(), end - start, start)
        if len(data) != end - start:
            raise InputError(f"{self.root / name}: ends before byte {end}")
        return data

    def write(self, name: str, start: int, data: bytes) -> None:
        """Puts bytes into a sparse file. They are available once they are listed."""
        with self._sparse(name) as descriptor:
            write_at(descriptor, data, start)

    def list(self, name: str, ranges: Ranges) -> None:
        """Says of bytes that were written that they are right."""
        with self._sparse(name) as descriptor:
            os.fsync(descriptor)
        text = "".join(f"{start} {end}\n" for start, end in ranges)
        with self._list(name).open("ab+") as stream:
            if stream.tell() and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n":
                text = f"\n{text}"  # behind a line that found no room
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def distrust(self, name: str) -> None:
        """Says of a file that is here that none of it is right: it counts as missing."""
        self._list(name).write_text("")

    def put(self, name: str, data: bytes) -> None:
        """Writes a whole file, or none."""
        self._write(self._path(name), data)

    def _write(self, file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as stream:
            temporary = Path(stream.name)
            try:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.replace(file)
            except BaseException:
                temporary.unlink()
                raise

    def link(self, name: str, whole: Path) -> None:
        """Takes a whole file from elsewhere in place of what is here of it."""
        file = self._path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            link = Path(folder) / file.name
            link.symlink_to(os.path.relpath(whole, file.parent.resolve()))
            link.replace(file)
        self._list(name).unlink(missing_ok=True)

    @contextmanager
    def _sparse(self, name: str) -> Iterator[int]:
        file = self._path(name)
        if file.is_symlink():
            file.unlink()  # what it leads to is not ours to write to
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            # First the list: a file of full length without one would look whole.
            self._list(name).write_text("")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.ftruncate(descriptor, self.manifest.files[name].size)
            yield descriptor
        finally:
            os.close(descriptor)

    def _path(self, name: str) -> Path:
        """Path of a file of the model. Raises InputError for a name that is none."""
        return self.root / FileName(name)

    def _list(self, name: str) -> Path:
        return self.root / (FileName(name) + LIST)


def write_at(descriptor: int, data: bytes, start: int) -> None:
    """Writes all of `data` at byte `start`. Raises OSError, as for a disk that has no more room.

    One call to the system writes a part of it, without an error, where there is room for a part.
    """
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, start)
        rest, start = rest[written:], start + written


def _range(line: str) -> Range | None:
    """The range in a line of a list; None for a line that is damaged.

    Of one that was cut off, as by a full disk, nothing or a part of the range is left.
    """
    start, _, end = line.partition(" ")
    if not (start.isdecimal() and end.isdecimal()) or int(start) >= int(end):
        return None
    return int(start), int(end)
