"""A saved state of llama.cpp with altered bytes is refused, or changes its own session alone.

All sequences share llama.cpp's memory: a bystander's logits stay the same bit for bit.
"""

import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.load import load, open_gguf
from node.ggml.stage import GgmlStage
from node.ggml.stage_file import Part, stage_file
from node.ring.bounds import FrameError
from tests.support.stage_head import StageHead, leaf, op
from tests.support.tiny_gguf import ARCHITECTURES, write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheOp, CacheState

TOKENS = 7
# As float16 and float32: infinite, infinite, none, and so large that sums of it are infinite.
BAD_NUMBERS = (b"\0\x7c\0\x7c", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x7f")
# Altered states of each architecture, and which.
ROUNDS = int(os.environ.get("UNICLUSTER_SAVED_STATES", "60"))
SEED = int(os.environ.get("UNICLUSTER_FUZZ_SEED", "1"))


def token_ids(batch: int, tokens: int) -> Any:
    return (np.arange(batch * tokens, dtype=np.uint32) % 200).reshape(batch, tokens)


def stage_of(folder: Path, architecture: str) -> GgmlStage:
    """All layers, whose input is token ids."""
    file = write_gguf(folder / "model.gguf", architecture, 12 if "next" in architecture else 6)
    checkpoint = whole(file)
    gguf = open_gguf(checkpoint)
    part = Part(0, gguf.layers, has_lm_head=True, context=256, users=2)
    cut = stage_file(gguf, checkpoint, folder / "stages", part)
    return load(gguf, folder, cut, part).stage


class Bystander:
    """A session whose next logits are looked at while another one stores states."""

    def __init__(self, stage: GgmlStage) -> None:
        self._stage = stage
        self._head = self.head()
        self._head.forward(1, 1, 5, op(1, "make"))
        saver = self.head()
        saver.forward(1, 1, TOKENS, op(1, "make"))
        self.state = saver.report(op(1, "fetch", entry=0)).state
        saver.end()
        self.undisturbed = self.logits()

    def head(self) -> StageHead:
        return StageHead(self._stage, token_ids)

    def logits(self) -> bytes:
        """A state of one token more, which is taken back."""
        self._head.send(op(2, "copy", source=1))
        data = self._head.forward(2, 1, 1).hidden[0].tensor.data
        self._head.send(op(2, "free"))
        return data

    def beside(self, saved: bytes) -> tuple[bytes, bool]:
        """Logits beside a session that stores and uses `saved`, and whether that was refused."""
        other = self.head()
        try:
            other.forward(1, 1, 1, op(1, "make"), store(self.state, saved))
            refused = False
        except StageError:
            refused = True
        logits = self.logits()
        other.end()
        return logits, refused


def store(state: CacheState, saved: bytes) -> CacheOp:
    made = op(1, "store", entry=0, kind=state.kind)
    made.store.state.extend(state.state)
    made.store.state[1].CopyFrom(leaf(np.frombuffer(saved, np.uint8), state.state[1].key))
    return made


def altered(state: bytes, maker: random.Random) -> bytes:
    data = bytearray(state)
    for _ in range(maker.randint(1, 3)):
        near = maker.random() < 0.5
        at = maker.randrange(min(len(data), 200) if near else len(data))
        what = maker.randrange(4)
        if what == 0:
            data[at] = maker.choice((0, 1, 2, 127, 128, 255))
        elif what == 1:
            at -= at % 4
            data[at : at + 4] = maker.choice(
                (b"\0\x7c\0\x7c", b"\0\0\x80\x7f", b"\xff" * 4, b"\0\0\0\x7f")
            )
        elif what == 2:
            at -= at % 4
            data[at : at + 4] = struct.pack("<i", maker.choice((-1, 0, 6, 7, 255, 2**31 - 1)))
        else:
            del data[at : at + maker.choice((1, 4, 12, 4096))]
    return bytes(data)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_altered_states_leave_other_sessions_logits_alone(
    architecture: str, tmp_path: Path
) -> None:
    stage = stage_of(tmp_path, architecture)
    bystander = Bystander(stage)
    honest = bystander.state.state[1].tensor.data
    beside_honest, refused = bystander.beside(honest)
    assert not refused
    maker = random.Random(f"{SEED} {architecture}")
    outcomes = {True: 0, False: 0}

    for _ in range(ROUNDS):
        saved = altered(honest, maker)
        logits, refused = bystander.beside(saved)
        outcomes[refused] += 1
        assert logits == (bystander.undisturbed if refused else beside_honest)

    assert outcomes[True] > ROUNDS // 4
    assert bystander.logits() == bystander.undisturbed


# A state of llama's: magic, sequence; streams, cells; a position and two more numbers a cell.
CELLS_AT, CELL, BLOCKS_AT = 12, 12, 16 + 12 * TOKENS
ALTERED = {
    "another magic number": (0, b"\0\0\0\0"),
    "two streams": (8, struct.pack("<I", 2)),
    "no cells": (CELLS_AT, struct.pack("<I", 0)),
    "fewer cells": (CELLS_AT, struct.pack("<I", TOKENS - 1)),
    "four billion cells": (CELLS_AT, b"\xff" * 4),
    "a position twice": (CELLS_AT + 4, struct.pack("<i", 1)),
    "a position far behind": (CELLS_AT + 4, struct.pack("<i", 2**31 - 1)),
    "a negative position": (CELLS_AT + 4, struct.pack("<i", -1)),
    "a cell of two sequences": (CELLS_AT + 8, struct.pack("<I", 2)),
    "other values": (BLOCKS_AT, struct.pack("<I", 7)),
    "other layers": (BLOCKS_AT + 4, struct.pack("<I", 7)),
    "another type": (BLOCKS_AT + 8, struct.pack("<I", 30)),
    "rows of another size": (BLOCKS_AT + 12, struct.pack("<Q", 1)),
    "a key that is infinite": (BLOCKS_AT + 20, b"\0\0\x80\x7f"),
    "a key that is no number": (BLOCKS_AT + 20, b"\xff" * 4),
    "a value that is no number": (-4, b"\xff" * 4),
}


def test_each_part_of_a_state_is_checked(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "llama")
    bystander = Bystander(stage)
    honest = bystander.state.state[1].tensor.data
    for name, (at, changed) in ALTERED.items():
        saved = bytearray(honest)
        at %= len(saved)
        assert saved[at : at + len(changed)] != changed, name
        saved[at : at + len(changed)] = changed
        other = bystander.head()
        with pytest.raises(FrameError, match="store of cache 1"):
            other.send(op(1, "make"), store(bystander.state, bytes(saved)))
        other.end()
        assert bystander.logits() == bystander.undisturbed, name
    for saved in (honest[:-1], honest + b"\0", honest[:20]):
        with pytest.raises(FrameError, match="store of cache 1"):
            bystander.head().send(op(1, "make"), store(bystander.state, bytes(saved)))
