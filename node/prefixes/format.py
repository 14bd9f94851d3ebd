"""The format of a file of saved caches, sealed so that nothing is used that was changed.

A magic number and version, the header's length; the header in JSON, which names the caches, their
arrays, and the files of blocks that come before these; a seal over all that; the arrays' bytes,
little-endian, one after another; a seal over the whole. Seals are keyed hashes:
only who has the machine's key can make one.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from node.prefixes.saved import DTYPES, Array, SavedArray, SavedEntry

MAGIC = b"ucprefix"
VERSION = 2
MOST_HEADER = 16 << 20
SEAL_BYTES = 32
# Written and hashed at a time: for so long other threads may wait for the processor.
BLOCK_BYTES = 1 << 20
_FRONT = struct.Struct("<8sII")
FRONT_BYTES = _FRONT.size


class DamagedError(Exception):
    """A file that is cut off, was changed, is sealed with another key, or is of another kind."""


class Sealed:
    """Caches as a file will have them. `nbytes` of the file are known before it is written."""

    def __init__(
        self, name: str, key: bytes, entries: Sequence[SavedEntry], blocks: Sequence[str] = ()
    ) -> None:
        """name: of the file, which is sealed with it. key: of 16 to 64 bytes.

        blocks: names of the files that have the tokens before those of `entries`, in order.
        """
        self._key = key
        leaves = [leaf for entry in entries for _, leaf in entry.leaves]
        self._arrays = [leaf for leaf in leaves if isinstance(leaf, SavedArray)]
        described = [_described(entry) for entry in entries]
        header = {"name": name, "blocks": list(blocks), "entries": described}
        self._header = json.dumps(header).encode()
        size = _FRONT.size + len(self._header) + 2 * SEAL_BYTES
        self.nbytes = size + sum(array.values.nbytes for array in self._arrays)

    def write(self, file: BinaryIO, before_each: Callable[[], None] = lambda: None) -> None:
        """Writes all of it, BLOCK_BYTES at a time, `before_each` of which it may wait.

        Raises OSError.
        """
        seal = _seal(self._key)
        front = _FRONT.pack(MAGIC, VERSION, len(self._header)) + self._header
        seal.update(front)
        file.write(front)
        file.write(seal.digest())
        for array in self._arrays:
            for block in _blocks(array.values):
                before_each()
                seal.update(block)
                file.write(block)
        file.write(seal.digest())


@dataclass(frozen=True)
class Contents:
    """Caches in a file, and the names of the files of blocks that come before them."""

    entries: list[SavedEntry]
    blocks: list[str]


def is_older(front: bytes) -> bool:
    """Whether the first FRONT_BYTES of a file are those of an earlier version of the format."""
    if len(front) != FRONT_BYTES:
        return False
    magic, version, _ = _FRONT.unpack(front)
    return bool(magic == MAGIC and version < VERSION)


def read(file: BinaryIO, size: int, name: str, key: bytes) -> Contents:
    """The contents of a file of `size` bytes. Raises DamagedError, OSError or MemoryError.

    Nothing is taken from the header before its seal is checked, nor are arrays returned before
    that of the whole is.
    """
    if size < _FRONT.size + 2 * SEAL_BYTES:
        raise DamagedError(f"{size} bytes are too few")
    seal = _seal(key)
    front = _exactly(file, _FRONT.size)
    magic, version, length = _FRONT.unpack(front)
    if magic != MAGIC or version != VERSION:
        raise DamagedError("it is of another kind or version")
    if length > min(MOST_HEADER, size - _FRONT.size - 2 * SEAL_BYTES):
        raise DamagedError("it is cut off")
    header = _exactly(file, length)
    seal.update(front + header)
    if _exactly(file, SEAL_BYTES) != seal.digest():
        raise DamagedError("its header was changed, or is another machine's")
    contents, arrays = _made(header, name, size - _FRONT.size - length - 2 * SEAL_BYTES)
    for array in arrays:
        _fill(file, array, seal)
    if _exactly(file, SEAL_BYTES) != seal.digest():
        raise DamagedError("it was changed")
    return contents


def _seal(key: bytes) -> Any:
    return hashlib.blake2b(key=key, digest_size=SEAL_BYTES)


def _described(entry: SavedEntry) -> dict[str, Any]:
    leaves = [
        [key, leaf.dtype, list(leaf.values.shape), leaf.axis]
        if isinstance(leaf, SavedArray)
        else [key, leaf]
        for key, leaf in entry.leaves
    ]
    return {"kind": entry.kind, "leaves": leaves}


def _made(header: bytes, name: str, size: int) -> tuple[Contents, list[Array]]:
    """The contents by a header, and their arrays, still empty, which take `size` bytes."""
    described = json.loads(header)
    if described["name"] != name:
        raise DamagedError("it has another file's name")
    shapes = [leaf for entry in described["entries"] for leaf in entry["leaves"] if len(leaf) > 2]
    if sum(math.prod(s) * np.dtype(DTYPES[d]).itemsize for _, d, s, _ in shapes) != size:
        raise DamagedError("it is cut off, or too long")
    arrays: list[Array] = []

    def leaf(key: str, kind: str, *array: Any) -> tuple[str, SavedArray | str]:
        if not array:
            return key, kind
        shape, axis = array
        arrays.append(np.empty(shape, DTYPES[kind]))
        return key, SavedArray(kind, arrays[-1], axis)

    entries = [
        SavedEntry(entry["kind"], tuple(leaf(*fields) for fields in entry["leaves"]))
        for entry in described["entries"]
    ]
    return Contents(entries, [str(block) for block in described["blocks"]]), arrays


def _fill(file: BinaryIO, array: Array, seal: Any) -> None:
    if not array.size:
        return
    rest = _bytes(array)
    while rest:
        count = file.readinto(rest[:BLOCK_BYTES])  # type: ignore[attr-defined]  # of FileIO
        if not count:
            raise DamagedError("it is cut off")
        seal.update(rest[:count])
        rest = rest[count:]


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise DamagedError("it is cut off")
    return data


def _blocks(array: Array) -> Iterator[memoryview]:
    """The bytes of an array in order, at most BLOCK_BYTES at a time, copied only where strided."""
    if not array.size:
        return
    if array.flags.c_contiguous:
        flat = _bytes(array)
        for start in range(0, len(flat), BLOCK_BYTES):
            yield flat[start : start + BLOCK_BYTES]
    elif array.nbytes <= BLOCK_BYTES:
        yield _bytes(np.ascontiguousarray(array))
    else:
        for part in array:
            yield from _blocks(part)


def _bytes(array: Array) -> memoryview:
    """The memory of an array that has its numbers one after another."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)
