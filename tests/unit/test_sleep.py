"""Sleep of machines: told by their clocks, and news once."""

from pathlib import Path

import pytest

from coordinator.fleet.slept import Slept
from coordinator.serving.events import Events, StageFailed, WasAsleep
from coordinator.state.database import Database
from coordinator.state.event_log import EventLog
from coordinator.terminal.event_log import EventLogger
from node.power.clocks import Sleep


def test_a_clock_that_stood_tells_of_sleep() -> None:
    behind = [1000.0]
    sleep = Sleep(lambda: behind[-1])
    assert sleep.seconds == 0

    behind.append(1000.4)  # the two clocks are not read at once
    assert sleep.seconds == 0
    behind.append(1312.0)
    assert sleep.seconds == 312


def test_this_machine_is_awake_while_tests_run() -> None:
    assert Sleep().seconds == 0


def test_sleep_is_news_once() -> None:
    slept = Slept()
    slept.note({"ann": 0.0, "bob": 50.0})
    slept.note({"ann": 0.0})
    assert slept.take() == {}

    slept.note({"ann": 0.0, "bob": 362.0})
    assert slept.take() == {"bob": 312.0}
    slept.note({"ann": 0.0, "bob": 362.0})
    assert slept.take() == {}


def test_an_agent_that_started_anew_counts_from_nothing() -> None:
    slept = Slept()
    slept.note({"bob": 50.0})
    slept.note({"bob": 0.0})
    slept.note({"bob": 7.0})

    assert slept.take() == {"bob": 7.0}


def test_it_is_counted() -> None:
    events, event = Events(), WasAsleep("bob", 312.4)
    events.publish(event)

    assert events.losses == {"asleep": 1}


def test_sleep_that_was_announced_is_counted_once() -> None:
    events = Events()
    events.publish(StageFailed("bob", "machine bob goes to sleep", "asleep"))
    events.publish(WasAsleep("bob", 312.4))
    assert events.losses == {"asleep": 1}

    events.publish(WasAsleep("bob", 5.0))  # a nap of which it has said nothing
    assert events.losses == {"asleep": 2}


def test_the_log_says_for_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    logger = EventLogger("llama")
    logger.handle(WasAsleep("bob", 312.4))
    logger.close()

    (logged,) = EventLog(Database()).newest(1)
    assert (logged.kind, logged.machine, logged.cause) == ("was asleep", "bob", "asleep")
    assert logged.text == "for 312 s"
