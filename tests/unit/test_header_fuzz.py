"""Headers of safetensors and GGUF, mutated from real ones: read, or refused with InputError."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints import gguf, safetensors
from unicluster.errors import InputError

ROUNDS = 400
HUGE = [0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def mutated(valid: bytes, rng: random.Random, header: int) -> bytes:
    """`valid` with some bytes or numbers of its first `header` bytes changed, or cut off."""
    data = bytearray(valid)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(header)
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
            case 2:
                data[at : at + rng.randrange(1, 9)] = b""
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
    return bytes(data[: rng.randrange(header)]) if rng.randrange(5) == 0 else bytes(data)


def read_or_refused(read: Any, file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        header = read(file)
    except InputError:
        return
    for tensor in header.tensors.values():
        start, end = tensor if isinstance(tensor, tuple) else tensor.bytes
        assert 0 <= start <= end <= len(data)


def test_mutated_safetensors(tmp_path: Path) -> None:
    valid = (
        write_model(tmp_path / "tiny", tiny_config("llama")) / "model.safetensors"
    ).read_bytes()
    rng, end = random.Random(14), safetensors.header_length(valid[:8])
    for _ in range(ROUNDS):
        data = mutated(valid, rng, end)
        read_or_refused(safetensors.read_header, tmp_path / "model.safetensors", data)


def test_mutated_ggufs(tmp_path: Path) -> None:
    valid = write_gguf(tmp_path / "tiny.gguf", "llama").read_bytes()
    rng, end = random.Random(14), gguf.read_header(tmp_path / "tiny.gguf").end
    for _ in range(ROUNDS):
        read_or_refused(gguf.read_header, tmp_path / "model.gguf", mutated(valid, rng, end))


def of_safetensors(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


DAMAGED = {
    "a list": [1],
    "a tensor twice": b'{"a": {"data_offsets": [0, 0]}, "a": {"data_offsets": [0, 0]}}',
    "a tensor before the file": {"a": {"data_offsets": [-9, 0]}},
    "a tensor that ends before it begins": {"a": {"data_offsets": [4, 0]}},
    "offsets with a point": {"a": {"data_offsets": [0.0, 0.0]}},
    "offsets that are infinite": b'{"a": {"data_offsets": [0, Infinity]}}',
    "a deep list": b"[" * 100_000,
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_of_safetensors_is_refused(header: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(of_safetensors(header))
    with pytest.raises(InputError, match="damaged safetensors"):
        safetensors.read_header(file)
