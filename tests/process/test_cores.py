"""Processes that compute on one machine know of each other, also of those that were killed."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from node.metering.cores import PLACES, WIDTH, Cores
from tests.support.cluster import until
from unicluster.program import child_environment, code_command

COMPUTES = """
import sys
from pathlib import Path
from node.metering.cores import Cores
cores = Cores(Path(sys.argv[1]))
print("idle", flush=True)
for line in sys.stdin:
    with cores.computing(3):
        print("computes", flush=True)
        sys.stdin.readline()
    print("idle", flush=True)
"""


class Other:
    """Another process with a place; `turn` has it begin to compute, or end that."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [*code_command(COMPUTES), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        assert self._said() == "idle"

    def turn(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._said()

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def other(path: Path) -> Iterator[Other]:
    process = Other(path)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cores"


@pytest.fixture
def cores(file: Path) -> Iterator[Cores]:
    opened = Cores(file)
    yield opened
    opened.close()


def test_one_that_computes_is_counted_with_its_threads(file: Path, cores: Cores) -> None:
    with other(file) as process:
        assert cores.computing_now() == []
        assert process.turn() == "computes"
        assert cores.computing_now() == [3]
        assert process.turn() == "idle"
        assert cores.computing_now() == []


def test_a_process_does_not_count_itself(cores: Cores) -> None:
    with cores.computing(3):
        assert cores.computing_now() == []


def test_one_that_was_killed_as_it_computed_is_counted_no_more(file: Path, cores: Cores) -> None:
    with other(file) as process:
        assert process.turn() == "computes"
        assert cores.computing_now() == [3]
    until(lambda: not cores.computing_now(), "its place is free again")


def test_a_place_that_is_left_is_taken_again(file: Path, cores: Cores) -> None:
    for _ in range(3):
        with other(file) as process:
            assert process.turn() == "computes"
    used = np.fromfile(file).reshape(PLACES, -1).any(axis=1)
    assert not used[2:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e300, -1e300])
def test_a_damaged_file_counts_nobody(file: Path, value: float) -> None:
    file.write_bytes(np.full(PLACES * WIDTH // 8 + 5, value).tobytes())
    opened = Cores(file)
    try:
        assert opened.computing_now() == []
    finally:
        opened.close()


def test_no_more_places_than_there_are(file: Path, cores: Cores) -> None:
    """All are locked by another process, but for the one here."""
    locks = f"""
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, {PLACES * WIDTH}, {WIDTH})
print("locked", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [*code_command(locks), str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "locked"
        ours = subprocess.run(
            [*code_command(COMPUTES), str(file)],
            capture_output=True,
            text=True,
            env=child_environment(),
            check=False,
        )
        process.kill()
    assert f"all {PLACES} places" in ours.stderr


def test_a_link_a_folder_and_what_is_unreadable_are_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("somebody's")
    (tmp_path / "link").symlink_to(elsewhere)
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "link", tmp_path, tmp_path / "nowhere" / "file", tmp_path / "pipe"):
        with pytest.raises(OSError):  # noqa: PT011 - of several kinds
            Cores(path)

    assert elsewhere.read_text() == "somebody's"
