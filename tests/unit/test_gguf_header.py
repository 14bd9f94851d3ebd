"""Headers of GGUFs that are damaged: refused by name, without reading or counting for ever."""

import struct
from pathlib import Path

import pytest

from unicluster.checkpoints import gguf
from unicluster.checkpoints.gguf import ARRAY, BOOL, STRING, UINT32, gguf_header_end, read_header
from unicluster.errors import InputError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(key: str, kind: int, value: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    """A header with one value of metadata."""
    start = gguf.MAGIC + struct.pack("<IQQ", 3, count, 1)
    return start + text(key) + struct.pack("<I", kind) + value + tensors


DAMAGED = {
    "an array of arrays": (
        header("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000),
        "an array of arrays",
    ),
    "an alignment of 0": (
        header("general.alignment", UINT32, struct.pack("<I", 0)),
        "alignment is no power of two",
    ),
    "an alignment that is a text": (
        header("general.alignment", STRING, text("32")),
        "alignment is no power of two",
    ),
    "a tensor of many dimensions": (
        header("a", BOOL, b"\1", text("w") + struct.pack("<I", 1 << 31), count=1),
        "dimensions",
    ),
    "a type that is not known": (
        header("a", BOOL, b"\1", text("w") + struct.pack("<IQIQ", 1, 32, 99, 0), count=1),
        "tensors of type 99 are not known here",
    ),
    "an endless list": (
        header("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60)),
        "its header is cut off",
    ),
    "an endless text": (header("a", STRING, struct.pack("<Q", 1 << 60)), "its header is cut off"),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        read_header(file)


def test_of_a_header_that_claims_to_be_endless_not_all_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf, "MOST_BYTES", 4 * gguf.FIRST_BYTES)
    start = header("a", STRING, struct.pack("<Q", 1 << 60))
    for wanted in (gguf.FIRST_BYTES, 4 * gguf.FIRST_BYTES):
        assert gguf_header_end(start) == wanted
        start = start.ljust(wanted, b"x")
    with pytest.raises(InputError, match="a header of more than"):
        gguf_header_end(start)
