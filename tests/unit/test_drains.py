"""Drained machines in the state file: kept over restarts, and never against a newer order."""

import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.state.database import MIGRATIONS, Database
from coordinator.state.drains import Drains
from coordinator.state.services import Services
from unicluster.errors import UnavailableError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite3"


@pytest.fixture
def drains(path: Path) -> Drains:
    return Drains(Database(path))


def test_a_drained_machine_is_drained_again_once_its_agent_has_started_anew(
    drains: Drains, path: Path
) -> None:
    assert not drains.follow("bob", drained=True, ordered=True)
    again = Drains(Database(path))

    assert again.follow("bob", drained=False, ordered=False)
    assert not again.follow("ann", drained=False, ordered=False)
    assert again.names() == {"bob"}


@pytest.mark.parametrize("ordered", [True, None], ids=["taken back", "an older agent"])
def test_what_an_agent_says_last_counts(drains: Drains, ordered: bool | None) -> None:
    drains.note("bob", drained=True)

    assert not drains.follow("bob", drained=False, ordered=ordered)
    assert not drains.follow("bob", drained=False, ordered=False)
    assert drains.names() == set()


def test_a_machine_is_known_by_its_id_and_not_by_its_name(drains: Drains) -> None:
    drains.note("bob", "id of bob", drained=True)

    # Another machine took the name, or this one was installed anew.
    assert not drains.follow("bob", "id of another", drained=False, ordered=False)
    assert drains.follow("robert", "id of bob", drained=False, ordered=False)
    assert drains.names() == {"robert"}
    drains.note("robert", "id of bob", drained=False)
    assert drains.names() == set()


def test_a_record_of_a_name_becomes_that_of_the_machine(drains: Drains) -> None:
    drains.note("bob", drained=True)  # by an older agent, or an older state file

    assert drains.follow("bob", "id of bob", drained=False, ordered=False)
    assert drains.follow("robert", "id of bob", drained=False, ordered=False)
    assert not drains.follow("bob", "id of another", drained=False, ordered=False)
    assert drains.names() == {"robert"}


def test_taken_back_is_taken_back_by_name_too(drains: Drains) -> None:
    drains.note("bob", drained=True)
    drains.note("bob", "id of bob", drained=False)

    assert drains.names() == set()


def test_drained_machines_of_an_older_file_stay_drained(path: Path) -> None:
    with sqlite3.connect(path) as old:
        for migration in MIGRATIONS[:5]:
            old.executescript(migration)
        old.execute("INSERT INTO drains VALUES ('bob', 1.0)")
        old.execute("PRAGMA user_version = 5")
    old.close()

    drains = Drains(Database(path))

    assert drains.names() == {"bob"}
    assert drains.follow("bob", "id of bob", drained=False, ordered=False)


def test_an_order_is_noted_once(drains: Drains) -> None:
    for _ in range(3):
        drains.note("bob", drained=True)
    assert drains.names() == {"bob"}
    for _ in range(2):
        drains.note("bob", drained=False)
    assert drains.names() == set()


def test_a_state_file_that_is_gone_drains_nothing(drains: Drains, path: Path) -> None:
    drains.note("bob", drained=True)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE drained")
    other.close()

    assert not drains.follow("bob", drained=False, ordered=False)


def test_a_full_disk_is_said_once_until_it_can_be_written_again(
    drains: Drains, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write = Database.write

    def full(self: Database, statement: str, values: Sequence[object] = ()) -> int:
        raise UnavailableError("database or disk is full")

    def poll() -> list[str]:
        caplog.clear()
        drains.follow("ann", "id of ann", drained=False, ordered=True)  # nothing to write
        drains.follow("bob", "id of bob", drained=True, ordered=True)
        drains.follow("cat", "id of cat", drained=True, ordered=True)
        return [record.getMessage() for record in caplog.records]

    monkeypatch.setattr(Database, "write", full)
    assert poll() == ["which machines are drained is not kept: database or disk is full"]
    assert [poll() for _ in range(3)] == [[], [], []]

    monkeypatch.setattr(Database, "write", write)
    assert poll() == ["which machines are drained is kept again"]
    assert drains.names() == {"bob", "cat"}
    monkeypatch.setattr(Database, "write", full)
    drains.follow("bob", "id of bob", drained=False, ordered=True)
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_state_files_of_all_versions_are_migrated(path: Path, version: int) -> None:
    with sqlite3.connect(path) as old:
        for migration in MIGRATIONS[:version]:
            old.executescript(migration)
        old.execute(f"PRAGMA user_version = {version}")
    old.close()

    database = Database(path)

    assert Drains(database).names() == set()
    assert Services(database).begin("llama", "{}").last is None
