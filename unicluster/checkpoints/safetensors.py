"""The header of a safetensors file: which tensor is at which bytes.

The format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unicluster.checkpoints.ranges import Range
from unicluster.errors import InputError, in_one_line

# The length of the header comes first.
LENGTH_BYTES = 8
# The format allows no longer header.
MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class SafetensorsHeader:
    """tensors: the bytes of each, counted from the file's start. size: the whole file's."""

    end: int
    size: int
    tensors: dict[str, Range]


def header_length(start: bytes) -> int:
    """Bytes of length field and header together, from the first LENGTH_BYTES of a file."""
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    return LENGTH_BYTES + int(length)


def read_header(file: Path) -> SafetensorsHeader:
    """Raises InputError naming the file if it is damaged or not as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = _parse(stream, size)
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = in_one_line(error)
        raise InputError(f"{file}: damaged safetensors: {reason}") from error
    if header.size != size:
        raise InputError(
            f"{file}: damaged safetensors: {size} bytes instead of {header.size}; copy it again"
        )
    return header


def has_float8(file: Path) -> bool:
    """Whether a file that `read_header` takes has tensors of floats of 8 bits."""
    with file.open("rb") as stream:
        end = header_length(stream.read(LENGTH_BYTES))
        entries = _header(stream.read(end - LENGTH_BYTES))
    return any(str(entry.get("dtype", "")).startswith("F8_") for entry in entries.values())


def _header(text: bytes) -> dict[str, Any]:
    """Tensors by name. Raises ValueError for what is no such JSON."""
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no list of tensors")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return made


def _parse(stream: BinaryIO, size: int) -> SafetensorsHeader:
    end = header_length(stream.read(LENGTH_BYTES))
    if end > size:
        raise ValueError("the header is cut off")
    if end > MOST_HEADER_BYTES:
        raise ValueError(f"a header of {end} bytes")
    tensors = {}
    for name, entry in _header(stream.read(end - LENGTH_BYTES)).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if type(first) is not int or type(last) is not int or not 0 <= first <= last:
                raise ValueError(f"a tensor at bytes {in_one_line(ValueError(entry))}")
            tensors[name] = (end + first, end + last)
    return SafetensorsHeader(end, max((last for _, last in tensors.values()), default=end), tensors)
