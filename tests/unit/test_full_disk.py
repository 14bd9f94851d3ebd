"""The state file on a disk that is full: nothing breaks, and it goes on when there is room."""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.commands.lasting import lasting
from coordinator.models.catalog import Source
from coordinator.serving.events import Events, Unloading
from coordinator.serving.options import ServeOptions
from coordinator.state.database import NAME, Database
from coordinator.state.event_log import EventLog
from coordinator.terminal.event_log import EventLogger
from tests.support.mounts import fill, small_disk
from unicluster.errors import InputError, UnavailableError


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as made:
        if made is None:
            pytest.skip("only root may mount a small disk")
        yield made


def kinds(database: Database) -> list[str]:
    return [event.kind for event in EventLog(database).newest(10)]


def test_a_write_fails_in_a_line_and_works_when_there_is_room(disk: Path) -> None:
    with contextlib.closing(Database(disk / NAME)) as database:
        EventLog(database).add("tiny", "before")
        filler = fill(disk)

        with pytest.raises(UnavailableError, match=rf"^the state file {disk / NAME} .* full$"):
            EventLog(database).add("tiny", "lost")
        assert kinds(database) == ["before"]

        filler.unlink()
        EventLog(database).add("tiny", "after")
        assert kinds(database) == ["before", "after"]
        assert database.rows("PRAGMA integrity_check")[0][0] == "ok"


def test_it_is_opened_and_read_while_another_process_has_it_open(disk: Path) -> None:
    with contextlib.closing(Database(disk / NAME)) as database:
        EventLog(database).add("tiny", "before")
        fill(disk)

        with contextlib.closing(Database(disk / NAME)) as second:
            assert kinds(second) == ["before"]


def test_a_schema_that_can_not_be_written_is_no_wrong_input(disk: Path) -> None:
    """A command that ends so is started again by its unit, which input that is wrong prevents."""
    filler = fill(disk)

    with pytest.raises(UnavailableError, match=r"can't be used: .* full"):
        Database(disk / NAME)

    filler.unlink()
    with contextlib.closing(Database(disk / NAME)) as database:
        EventLog(database).add("tiny", "after")
        assert kinds(database) == ["after"]


def test_a_file_that_is_no_database_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 100)

    with pytest.raises(InputError, match="can't be used: file is not a database"):
        Database(tmp_path / NAME)


def test_another_process_that_writes_for_long_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.state.database.BUSY_SECONDS", 0.01)
    with contextlib.closing(Database(tmp_path / NAME)) as database:
        other = sqlite3.connect(tmp_path / NAME, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(UnavailableError, match="database is locked"):
            EventLog(database).add("tiny", "ready")

        other.close()
        EventLog(database).add("tiny", "ready")


async def test_the_event_log_says_it_once_and_goes_on(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UNICLUSTER_HOME", str(disk))
    events, ended = Events(), Unloading("tiny")
    with events.followed(EventLogger("tiny"), "the event log") as follower:
        for _ in range(2):
            filler = fill(disk)
            for _ in range(3):
                events.publish(ended)
            assert await follower.caught_up()
            filler.unlink()
            events.publish(ended)
            assert await follower.caught_up()

    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.exc_info for r in warnings] == [None, None]
    assert all("the event log: the state file" in r.getMessage() for r in warnings)
    with contextlib.closing(Database()) as database:
        assert kinds(database) == ["unloaded", "unloaded"]


async def test_a_service_ends_as_it_should_on_a_full_disk(
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ServeOptions(Source("tiny", "", "tiny"), service="tiny")
    monkeypatch.setenv("UNICLUSTER_HOME", str(disk))
    async with lasting(options):
        filler = fill(disk)
    assert "still counts as wanted" in caplog.text

    filler.unlink()
    async with lasting(options) as service:  # the row that is left prevents nothing
        assert service is not None
        assert service.last is None
