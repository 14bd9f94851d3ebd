"""A stage's file shares blocks with the model's, where the file system can, and is the same."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.doctor.disk import models_disk
from node.ggml.cut import Gguf
from node.ggml.load import open_gguf
from node.ggml.stage_file import Part, disk_bytes, file_bytes, stage_file
from node.weights.clone import BLOCK, can_clone
from tests.support.any_gguf import SPECS, derived, save_random
from tests.support.mounts import formatted_disk
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import read_header

DISK = 400 * 2**20  # XFS wants 300 MiB
LAYERS = 4
PARTS = [Part(0, 2, False), Part(2, LAYERS, True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 20 MB."""
    folder = tmp_path_factory.mktemp("model")
    wide = {"embedding_length": 256, "feed_forward_length": 1024}
    spec = replace(SPECS["llama"], layers=LAYERS, metadata=SPECS["llama"].metadata | wide)
    save_random(folder / "llama.gguf", derived(folder, "llama", spec))
    return folder / "llama.gguf"


@pytest.fixture(params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with formatted_disk(tmp_path / f"{request.param}.image", request.param, DISK) as folder:
        if folder is None:
            pytest.skip(f"needs root, loop devices and mkfs.{request.param}")
        yield folder


def made(file: Path, folder: Path, part: Part) -> tuple[Gguf, Path]:
    gguf = open_gguf(whole(file))
    stage = stage_file(gguf, whole(file), folder, part)
    stage.stream.close()
    return gguf, stage.path


def check(file: Path, gguf: Gguf, stage: Path, part: Part) -> None:
    """All tensors are those of the model."""
    tensors = read_header(stage).tensors
    for piece in gguf.pieces(part.first, part.end, part.has_lm_head):
        start, end = tensors[piece.name].bytes
        data = stage.read_bytes()[start:end]
        if piece.source is None:
            assert data == bytes(piece.size)
        else:
            first, last = gguf.tensors[piece.source][1].bytes
            assert data == file.read_bytes()[first:last]


def free(disk: Path) -> int:
    os.sync()
    room = os.statvfs(disk)
    return room.f_bfree * room.f_bsize


@pytest.mark.parametrize("part", PARTS, ids=["first", "last"])
def test_layers_lie_at_the_same_place_in_a_block(model: Path, tmp_path: Path, part: Part) -> None:
    gguf, stage = made(model, tmp_path / "stages", part)

    check(model, gguf, stage, part)
    name = f"blk.{part.first}.attn_norm.weight"
    before = gguf.tensors[name][1].bytes[0]
    after = read_header(stage).tensors["blk.0.attn_norm.weight"].bytes[0]
    assert (after - before) % BLOCK == 0


@pytest.mark.parametrize("part", PARTS, ids=["first", "last"])
def test_a_stage_takes_hardly_any_room_on_the_model_s_disk(
    model: Path, disk: Path, part: Part
) -> None:
    file = Path(shutil.copy(model, disk))
    before = free(disk)

    gguf, stage = made(file, disk / "stages", part)

    taken = before - free(disk)
    needed = disk_bytes(gguf, part, disk, disk / "stages")
    assert needed < file_bytes(gguf, part) / 4
    assert taken < max(needed, 2 * 2**20) < file_bytes(gguf, part)
    check(file, gguf, stage, part)


def test_a_shared_stage_outlives_the_model_s_file(model: Path, disk: Path) -> None:
    file = Path(shutil.copy(model, disk))
    _, stage = made(file, disk / "stages", PARTS[1])
    wanted = stage.read_bytes()

    file.write_bytes(bytes(file.stat().st_size))  # each has its own blocks from now on

    assert stage.read_bytes() == wanted


def test_another_disk_has_a_copy(model: Path, disk: Path, tmp_path: Path) -> None:
    assert not can_clone(model.parent, disk)
    part = PARTS[0]

    gguf, stage = made(model, disk / "stages", part)

    assert disk_bytes(gguf, part, model.parent, disk) == file_bytes(gguf, part)
    check(model, gguf, stage, part)


def test_doctor_says_that_blocks_can_be_shared(disk: Path) -> None:
    assert models_disk(disk / "hub").message.endswith("stages share blocks with their GGUF there")


def test_doctor_says_that_blocks_can_t_be_shared(tmp_path: Path) -> None:
    with formatted_disk(tmp_path / "ext4.image", "ext4", DISK) as folder:
        if folder is None:
            pytest.skip("needs root, loop devices and mkfs.ext4")
        finding = models_disk(folder / "hub" / "models")

    assert finding.message.split("; ")[0].endswith(f"free in {folder}")
    assert "a stage of a GGUF takes its bytes there once more" in finding.message
