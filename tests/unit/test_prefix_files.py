"""Files of prefixes: hostile and damaged ones, disks that fail, and the limit of bytes."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.prefixes.folder import PREFIXES, STATE, Folder
from node.prefixes.index import PrefixIndex
from node.prefixes.saved import SavedArray, SavedEntry
from node.prefixes.store import PrefixStore
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.prefixes import KEY, counted, files_in, store_in
from unicluster import failpoints

SECONDS = 30.0
NAME = "ab" * 16


def entry(numbers: int = 1000, fill: int = 7) -> SavedEntry:
    strided = np.arange(2 * numbers, dtype="<f4").reshape(2, numbers)[:, : numbers // 2]
    leaves: Any = (
        ("0", SavedArray("float32", strided)),
        ("1.a", SavedArray("bfloat16", np.full((3, 2), fill, "<u2"))),
        ("1.b", SavedArray("uint8", np.zeros((0, 4), "|u1"))),
        ("2", "null"),
    )
    return SavedEntry("KVCache", leaves)


def written(directory: Path, *names: str, **options: Any) -> PrefixStore:
    store = store_in(directory, **options)
    for name in names:
        store.put(name, [entry()])
        assert store.settle(scaled(SECONDS))
    return store


def found(store: PrefixStore, name: str = NAME) -> list[SavedEntry] | None:
    return store.read(name).result(scaled(SECONDS))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_was_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    written(tmp_path, NAME).close()
    (read,) = found(store_in(tmp_path)) or ()
    assert read.kind == "KVCache"
    for (key, ours), (other, theirs) in zip(entry().leaves, read.leaves, strict=True):
        assert key == other
        if isinstance(ours, SavedArray) and isinstance(theirs, SavedArray):
            assert (ours.dtype, ours.values.tolist()) == (theirs.dtype, theirs.values.tolist())
        else:
            assert ours == theirs


def test_files_are_private(tmp_path: Path) -> None:
    written(tmp_path, NAME)
    (file,) = files_in(tmp_path, STATE)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def _middle_changed(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def _header_changed(data: bytes) -> bytes:
    return data.replace(b"KVCache", b"KVCachf")


def _long_header(data: bytes) -> bytes:
    return data[:12] + b"\xff\xff\xff\xff" + data[16:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "only the seal cut off": lambda data: data[:-1],
    "empty": lambda _: b"",
    "too long": lambda data: data + b"x",
    "a bit of an array": _middle_changed,
    "a name in the header": _header_changed,
    "a header without end": _long_header,
    "another version": lambda data: data[:8] + b"\x7f" + data[9:],
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda _: b"GIF89a" * 100,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_not_there_and_is_removed_with_one_warning(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [NAME, "cd" * 16]
    store = written(tmp_path, *names)
    for file in files_in(tmp_path, STATE):
        file.write_bytes(DAMAGE[how](file.read_bytes()))
    assert [found(store, name) for name in names] == [None, None]
    assert files_in(tmp_path) == []
    assert len(warnings(caplog)) == 1
    store.put(NAME, [entry()])
    assert store.settle(scaled(SECONDS))
    assert found(store) is not None


def test_a_file_of_another_machine_or_name_is_not_used(tmp_path: Path) -> None:
    written(tmp_path, NAME)
    (file,) = files_in(tmp_path, STATE)
    file.rename(file.with_name("ef" * 16 + STATE))
    assert found(store_in(tmp_path), "ef" * 16) is None
    written(tmp_path, NAME)
    assert found(store_in(tmp_path, key=b"o" * 32)) is None


def test_links_pipes_and_directories_are_not_followed(tmp_path: Path) -> None:
    store = written(tmp_path, NAME)
    (file,) = files_in(tmp_path, STATE)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert found(store) is None
    file.unlink()
    os.mkfifo(file)
    assert found(store) is None
    file.unlink()
    file.mkdir()
    assert found(store) is None
    assert (tmp_path / "elsewhere").exists()


def test_those_used_longest_ago_go_first_and_the_bytes_stay_below_the_limit(tmp_path: Path) -> None:
    size = counted_of_one(tmp_path / "one")
    directory = tmp_path / "many"
    names = [f"{n:032x}" for n in range(4)]
    store = written(directory, *names[:3], limit=3 * size)
    for age, name in enumerate(names[:3]):
        os.utime(directory / PREFIXES / "stage" / (name + STATE), (age, age))
    assert found(store, names[0]) is not None  # and so it was used last
    store.put(names[3], [entry()])
    assert store.settle(scaled(SECONDS))
    assert {file.stem for file in files_in(directory)} == {names[0], names[2], names[3]}
    assert counted(directory) == store.nbytes == 3 * size


def test_the_limit_is_of_all_stages_together_and_a_smaller_one_holds_at_once(
    tmp_path: Path,
) -> None:
    size = counted_of_one(tmp_path / "one")
    directory = tmp_path / "many"
    for stage in ("a", "b", "c"):
        written(directory, NAME, name=stage, limit=3 * size).close()
    assert counted(directory) == 3 * size
    assert store_in(directory, "a", limit=2 * size).nbytes == counted(directory) == 2 * size


def counted_of_one(directory: Path) -> int:
    written(directory, NAME).close()
    return counted(directory)


def test_one_that_is_larger_than_the_limit_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, NAME, "cd" * 16, limit=100)
    assert files_in(tmp_path) == []
    assert len(warnings(caplog)) == 1


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("node.prefixes.folder._take_room", full)
    store = written(tmp_path, NAME, "cd" * 16)
    assert files_in(tmp_path) == []
    assert found(store) is None
    assert [w for w in warnings(caplog) if "No space" in w] == warnings(caplog)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("point", ["prefixes.write=error(no)", "prefixes.read=error(no)"])
def test_an_error_that_nobody_foresaw_costs_one_warning_and_that_prefix(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    monkeypatch.setattr(failpoints, "_points", failpoints.parse(f"{point}@1"))
    store = written(tmp_path, NAME)
    assert found(store) is None
    ours = [each for each in warnings(caplog) if not each.startswith("failpoint ")]
    assert len(ours) == 1
    assert ours[0].endswith("a prompt cache on disk is gone without: FailpointError: no")

    store.close()
    assert found(written(tmp_path, NAME)) is not None


@pytest.mark.parametrize("what", ["a file", "a link"])
def test_a_directory_that_is_none_costs_one_warning(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "a file":
        (tmp_path / PREFIXES).write_text("something")
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / PREFIXES).symlink_to(tmp_path / "other")
    assert PrefixStore.at(str(tmp_path), "stage", 1000, KEY) is None
    assert len(warnings(caplog)) == 1
    assert str(tmp_path) in warnings(caplog)[0]


def test_a_read_only_directory_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)  # root may write anywhere else
    assert PrefixStore.at(str(tmp_path / "new"), "stage", 1000, KEY) is None
    assert len(warnings(caplog)) == 1
    assert "Read-only file system" in warnings(caplog)[0]


def test_what_a_killed_process_was_writing_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    living = Folder(tmp_path, "stage", 1 << 20)
    stale = tmp_path / PREFIXES / "stage" / f"{NAME}{STATE}.0123.part"
    stale.write_bytes(bytes(100))
    with living.writing("cd" * 16, STATE, 50) as descriptor:
        store_in(tmp_path)
        assert not stale.exists()
        os.pwrite(descriptor, bytes(50), 0)
    assert [file.name for file in files_in(tmp_path)] == ["cd" * 16 + STATE]


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / PREFIXES).mkdir()
    (tmp_path / PREFIXES / "readme").write_text("mine")
    written(tmp_path, NAME, limit=2000)
    written(tmp_path, "cd" * 16, limit=2000)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / PREFIXES / "readme").exists()


def test_an_index_finds_the_longest_and_forgets_what_is_covered(tmp_path: Path) -> None:
    index = PrefixIndex(store_in(tmp_path))
    short, long = np.arange(100), np.arange(300)
    assert index.add(short, "ring", trimmable=True) == []
    index.add(np.arange(200), "ring", trimmable=False)
    covered = index.add(long, "ring", trimmable=True)
    assert sorted(len(prefix.tokens) for prefix in covered) == [100, 200]
    assert index.store.settle(scaled(SECONDS))
    until(lambda: len(PrefixIndex(index.store).store.tokens()) == 3, "all are written")
    again = PrefixIndex(store_in(tmp_path))
    best = again.find(np.arange(250), "ring", 0)
    assert best is not None
    assert (len(best[0].tokens), best[1]) == (300, 249)
    assert again.find(np.arange(250), "another ring", 0) is None
    assert again.find(np.arange(250), "ring", 200) is None
