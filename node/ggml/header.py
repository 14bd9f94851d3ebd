"""The header of a GGUF file: its metadata, and which tensor is at which bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from unicluster.errors import InputError
from unicluster.ranges import Range

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
STRING, ARRAY = 8, 9
# struct's letters for the types of plain values, by their number.
PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class CutOffError(Exception):
    """There are not enough bytes for the whole header."""


@dataclass(frozen=True)
class Value:
    """A value of the metadata: its type, and its bytes as they are in the file."""

    type: int
    raw: bytes = field(repr=False)

    def read(self) -> Any:
        """A number, a bool, a string, or a list of those."""
        return _Reader(self.raw).value(self.type)

    @property
    def length(self) -> int | None:
        """How many elements an array has; None for other values."""
        return int(struct.unpack_from("<Q", self.raw, 4)[0]) if self.type == ARRAY else None


@dataclass(frozen=True)
class TensorInfo:
    """shape: as ggml has it, rows first. type: ggml's number. bytes: in the file, unpadded."""

    shape: tuple[int, ...]
    type: int
    bytes: Range

    @property
    def size(self) -> int:
        return self.bytes[1] - self.bytes[0]

    @property
    def type_name(self) -> str:
        return GGMLQuantizationType(self.type).name.lower()


@dataclass(frozen=True)
class Header:
    """metadata: by key. end: where the tensors' bytes begin. size: how long the file must be."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    end: int

    @cached_property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))

    @property
    def size(self) -> int:
        return max((tensor.bytes[1] for tensor in self.tensors.values()), default=self.end)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(key)
        return default if value is None else value.read()

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key of the model's architecture."""
        return self.get(f"{self.architecture}.{key}", default)


def parse(data: "bytes | mmap.mmap") -> Header:
    """Raises CutOffError if `data` ends too early, ValueError for what is no GGUF."""
    if data[:4] != MAGIC[: len(data)]:
        raise ValueError("it is no GGUF file")
    reader = _Reader(data, 4)
    version = reader.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} of GGUF is not known here")
    tensor_count, value_count = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(value_count):
        key = reader.string()
        kind = reader.number("I")
        start = reader.at
        reader.skip(kind)
        metadata[key] = Value(kind, bytes(data[start : reader.at]))
    found = []
    for _ in range(tensor_count):
        name = reader.string()
        shape = tuple(reader.number("Q") for _ in range(reader.number("I")))
        found.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment")
    step = ALIGNMENT if alignment is None else int(alignment.read())
    end = -(-reader.at // step) * step
    tensors = {}
    for name, shape, kind, offset in found:
        start = end + offset
        tensors[name] = TensorInfo(shape, kind, (start, start + nbytes(shape, kind)))
    return Header(metadata, tensors, end)


def read_header(file: Path) -> Header:
    """Raises InputError naming the file if it is damaged, or shorter than its header says."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            header, size = parse(m), len(m)
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from error
    except CutOffError:
        raise InputError(f"{file}: damaged GGUF: its header is cut off; copy it again") from None
    except (struct.error, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: damaged GGUF: {reason}") from error
    if header.size > size:
        raise InputError(
            f"{file}: damaged GGUF: {size} bytes instead of {header.size}; copy it again"
        )
    return header


def nbytes(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor. Raises ValueError for a type that is not known."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return prod(shape) // block * block_bytes


class _Reader:
    def __init__(self, data: "bytes | mmap.mmap", at: int = 0) -> None:
        self._data = data
        self.at = at

    def number(self, letter: str) -> Any:
        try:
            (found,) = struct.unpack_from("<" + letter, self._data, self.at)
        except struct.error:
            raise CutOffError from None
        self.at += struct.calcsize("<" + letter)
        return found

    def string(self) -> str:
        length = self.number("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self._data):
            raise CutOffError
        return bytes(self._data[start : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(PLAIN[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in PLAIN:
            letters = f"<{count}{PLAIN[inner]}"
            values = struct.unpack_from(letters, self._data, self.at)
            self.at += struct.calcsize(letters)
            return list(values)
        return [self.value(inner) for _ in range(count)]

    def skip(self, kind: int) -> None:
        if kind == STRING:
            length = self.number("Q")
            self.at += length
        elif kind != ARRAY:
            self.at += struct.calcsize("<" + PLAIN[kind])
        else:
            inner, count = self.number("I"), self.number("Q")
            if inner in PLAIN:
                self.at += count * struct.calcsize("<" + PLAIN[inner])
            else:
                for _ in range(count):
                    self.skip(inner)
        if self.at > len(self._data):
            raise CutOffError
