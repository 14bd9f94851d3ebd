"""The header of a GGUF file: its metadata, and which tensor is at which bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Types and their sizes are
those of the `gguf` package. Its reader wants the whole file, and takes seconds for a tokenizer's
words; here the first bytes of a file are enough, and what they say is checked before it is used.
"""

import mmap
import struct
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUFValueType

from unicluster.checkpoints.ranges import Range
from unicluster.errors import InputError

MAGIC = struct.pack("<I", GGUF_MAGIC)
VERSIONS = (2, 3)
ALIGNMENT = int(GGUF_DEFAULT_ALIGNMENT)
MOST_DIMS = 4  # ggml.h: GGML_MAX_DIMS
# With a tokenizer a header has some megabytes, without one, in later parts, some kilobytes.
FIRST_BYTES = 1 << 16
# No header is longer; a damaged one may claim to be as long as the file.
MOST_BYTES = 1 << 28
# Tensors, or values of the metadata: the largest models have some thousands.
MOST_ENTRIES = 1 << 20
UINT32, BOOL = int(GGUFValueType.UINT32), int(GGUFValueType.BOOL)
STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
# struct's letters for the types of plain values, by their number.
PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Name, numbers in a block and bytes of a block, by ggml's number of the type.
TYPES: dict[int, tuple[str, int, int]] = {
    int(kind): (kind.name.lower(), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()
} | {
    # Of llama.cpp, and not, or otherwise, in this version of the package.
    9: ("q8_1", 32, 36),
    42: ("q2_0", 64, 18),
}


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
        return TYPES[self.type][0]


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

    def arch(self, key: str, default: Any = None) -> Any:
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
    if max(tensor_count, value_count) > MOST_ENTRIES:
        raise ValueError(f"{tensor_count} tensors and {value_count} values")
    metadata = {}
    for _ in range(value_count):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"two values of {key[:80]!r}")
        kind = reader.number("I")
        start = reader.at
        reader.skip(kind)
        metadata[key] = Value(kind, bytes(data[start : reader.at]))
    infos: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for _ in range(tensor_count):
        name = reader.string()
        if name in names:
            raise ValueError(f"two tensors named {name[:80]!r}")
        names.add(name)
        dims = reader.number("I")
        if dims > MOST_DIMS:
            raise ValueError(f"a tensor of {dims} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dims))
        infos.append((name, shape, reader.number("I"), reader.number("Q")))
    step = _alignment(metadata.get("general.alignment"))
    end = -(-reader.at // step) * step
    tensors = {}
    for name, shape, kind, offset in infos:
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


def gguf_header_end(start: bytes) -> int:
    """The first bytes of a file: where its header ends, or how many to look at to know.

    Raises InputError for what is no GGUF.
    """
    try:
        return parse(start).end
    except CutOffError:
        if len(start) >= MOST_BYTES:
            raise InputError(f"damaged GGUF: a header of more than {MOST_BYTES} bytes") from None
        return min(max(FIRST_BYTES, 4 * len(start)), MOST_BYTES)
    except (struct.error, ValueError, KeyError) as error:
        raise InputError(f"damaged GGUF: {' '.join(str(error).split())}") from error


def _alignment(stated: Value | None) -> int:
    """Alignment of tensors in the file, in bytes. Raises ValueError for what ggml rejects too."""
    if stated is None:
        return ALIGNMENT
    step = stated.read() if stated.type == UINT32 else 0
    if step < 1 or step & (step - 1):
        raise ValueError("its alignment is no power of two")
    return int(step)


def nbytes(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor. Raises ValueError for a type that is not known."""
    if kind not in TYPES:
        raise ValueError(f"tensors of type {kind} are not known here")
    _, block, block_bytes = TYPES[kind]
    return prod(shape) // block * block_bytes


class _Reader:
    def __init__(self, data: "bytes | mmap.mmap", at: int = 0) -> None:
        self._data = data
        self.at = at

    def number(self, letter: str) -> Any:
        try:
            (value,) = struct.unpack_from("<" + letter, self._data, self.at)
        except struct.error:
            raise CutOffError from None
        self.at += struct.calcsize("<" + letter)
        return value

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
        inner, count = self._array()
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
            inner, count = self._array()
            if inner in PLAIN:
                self.at += count * struct.calcsize("<" + PLAIN[inner])
            else:
                for _ in range(count):
                    self.skip(inner)
        if self.at > len(self._data):
            raise CutOffError

    def _array(self) -> tuple[int, int]:
        """The type of an array's values, and how many there are."""
        inner, count = self.number("I"), self.number("Q")
        if inner == ARRAY:
            raise ValueError("an array of arrays")  # as ggml: else it may go any number deep
        return inner, count
