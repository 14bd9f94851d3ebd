"""Files made for stages: whole or not at all, held while of use, removed when not."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from node.engines.ggml_engine import GgmlEngine
from node.ggml.load import open_gguf
from node.ggml.stage_file import Part, file_bytes, stage_file
from node.weights import caches, made
from node.weights.fetch import fetch_ranges
from node.weights.made import check_space, hold, making, remove_unused
from node.weights.sources import Sources
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.checkpoint import Checkpoint, File, Manifest
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import UnavailableError
from unicluster.v1.node_pb2 import StageSpec

Usage = namedtuple("Usage", "total used free")

NOBODY: Any = None  # who asks no machine needs no certificate

WRITER = """
import sys
from pathlib import Path
from node.weights.made import making
with making(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""
HOLDER = """
import sys
from pathlib import Path
from node.weights.made import hold
stream = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def child(program: str, file: Path) -> "subprocess.Popen[str]":
    """A process that is in the middle of the program."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with making(file) as stream:
        stream.write(b"all of it")
        assert not file.exists()
    assert file.read_bytes() == b"all of it"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_an_interrupted_file(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with making(tmp_path / "file") as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_what_a_killed_process_leaves_is_removed_and_not_what_a_living_one_writes(
    tmp_path: Path,
) -> None:
    killed, living = child(WRITER, tmp_path / "a"), child(WRITER, tmp_path / "b")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    parts = sorted(tmp_path.glob("*.part"))
    assert len(parts) == 2
    remove_unused(parts)

    assert names(tmp_path) == [f"b.{living.pid}.part"]
    living.communicate()
    assert names(tmp_path) == ["b"]


def test_a_file_that_another_process_holds_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a")
    holder = child(HOLDER, file)

    assert remove_unused([file]) == 0
    assert file.exists()
    assert hold(file) is not None  # several may

    holder.communicate()
    assert remove_unused([file, tmp_path / "none"]) > 0
    assert not file.exists()
    assert hold(file) is None


def disk_of(free: dict[str, int]) -> Any:
    """A disk whose free bytes grow with each file that `free` names and that is gone."""

    def usage(path: Any) -> Usage:
        gone = sum(size for file, size in free.items() if file and not Path(file).exists())
        return Usage(100, 0, free[""] + gone)

    return usage


def test_of_unused_files_only_as_many_are_removed_as_the_space_is_needed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"1")
    free = {"": 5} | {str(file): 10 for file in files}
    monkeypatch.setattr(shutil, "disk_usage", disk_of(free))

    check_space(tmp_path, 5, "model", files)
    assert names(tmp_path) == ["a", "b", "c"]
    check_space(tmp_path, 25, "model", files)
    assert names(tmp_path) == ["c"]
    with pytest.raises(UnavailableError, match=r"model: 36 .* are to be stored in .*, where 35 "):
        check_space(tmp_path, 36, "model", files)


NAMES = ("a", "a.b_c", "模型 ü", "*?", "a--b", "..a", "a-", "-", "a.git", "x" * 200, "%s {}", "a b")


def test_any_name_of_a_directory_has_a_folder_in_the_cache(cache: Path) -> None:
    folders = [caches.folder(f"/models/{name}") for name in NAMES]

    assert len(set(folders)) == len(NAMES)
    assert all(folder.parent == cache and len(folder.name) < 100 for folder in folders)
    assert folders[0].name == "models--unicluster--a"
    assert caches.folder("/models/a b") != caches.folder("/other/a b")


def spec(first: int, end: int) -> StageSpec:
    return StageSpec(first_layer=first, end_layer=end, finishes=end == 6, context=64, users=1)


def test_stages_of_another_cut_are_removed_unless_somebody_has_them(tmp_path: Path) -> None:
    checkpoint = whole(write_gguf(tmp_path / "model.gguf"))
    engine, folder = GgmlEngine(), caches.stages(checkpoint.manifest.model)
    revision = checkpoint.manifest.revision
    first, second = (engine.load(checkpoint, spec(*cut)) for cut in ((0, 2), (2, 6)))
    assert names(folder) == [f"{revision}-0-2.gguf", f"{revision}-2-6-out.gguf"]

    third = engine.load(checkpoint, spec(0, 3))
    assert len(names(folder)) == 3
    del first, second
    gc.collect()
    fourth = engine.load(checkpoint, spec(3, 6))
    assert names(folder) == [f"{revision}-0-3.gguf", f"{revision}-3-6-out.gguf"]
    del third, fourth
    gc.collect()
    assert engine.load(checkpoint, spec(0, 6)).weight_bytes > 0  # all of it, from the file itself
    assert names(folder) == []


def test_a_stage_s_file_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = whole(write_gguf(tmp_path / "model.gguf"))
    gguf, part, folder = open_gguf(checkpoint), Part(0, 3, has_lm_head=False), tmp_path / "stages"
    needed = file_bytes(gguf, part)
    old = caches.stages("/another/model.gguf") / "old.gguf"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"1")
    monkeypatch.setattr(shutil, "disk_usage", disk_of({"": needed - 2, str(old): 1}))

    with pytest.raises(UnavailableError, match=f"model.gguf: .* are to be stored in {folder}"):
        stage_file(gguf, checkpoint, folder, part)
    assert names(folder) == []
    assert not old.exists()

    monkeypatch.setattr(shutil, "disk_usage", disk_of({"": needed}))
    cut = stage_file(gguf, checkpoint, folder, part)
    assert needed < cut.path.stat().st_size < needed + 20_000


async def test_what_is_made_later_counts_when_a_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest("org/tiny:q4_0", "0" * 40, {"tiny-q4_0.gguf": File(1000)})
    checkpoint = Checkpoint.create(tmp_path / "copy", manifest)
    monkeypatch.setattr(made.shutil, "disk_usage", lambda path: Usage(2000, 500, 1500))
    wanted = {"tiny-q4_0.gguf": ((0, 1000),)}

    with pytest.raises(UnavailableError, match=r"org/tiny:q4_0: 1\.6 kB are to be stored"):
        await fetch_ranges(checkpoint, wanted, None, Sources((), NOBODY), made=600)


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    checkpoint = whole(write_gguf(tmp_path / "model.gguf"))
    folder = tmp_path / "stages"
    part = Part(0, 3, has_lm_head=False)
    folder.mkdir()
    blocking = folder / f"{checkpoint.manifest.revision}-0-3.gguf.{os.getpid()}.part"
    blocking.mkdir()

    with pytest.raises(UnavailableError, match=r"-0-3\.gguf: can't be written: Is a directory"):
        stage_file(open_gguf(checkpoint), checkpoint, folder, part)
