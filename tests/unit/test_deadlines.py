"""Deadlines of work: learned from measured times, generous before there are any."""

import time

import pytest

from unicluster.deadlines import DECODE, LOAD, PREFILL, VARIABLE, Work, WorkDeadlines
from unicluster.stall import Stall

FLOOR = 10.0


@pytest.fixture(autouse=True)
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(FLOOR))


def learned(*times: tuple[Work, float], **predicted: float) -> WorkDeadlines:
    deadlines = WorkDeadlines(predicted)
    for work, seconds in times:
        deadlines.note(work, seconds)
    return deadlines


def test_fast_work_may_take_as_long_as_the_floor() -> None:
    assert learned((DECODE, 0.01)).limit(DECODE) == FLOOR


def test_slow_work_may_take_a_multiple_of_its_times() -> None:
    deadlines = learned(*[(DECODE, 2.0)] * 9)

    assert deadlines.limit(DECODE) == 40.0


def test_one_long_time_is_not_taken_for_the_usual_one() -> None:
    deadlines = learned(*[(DECODE, 0.01)] * 20, (DECODE, 5.0))

    assert deadlines.limit(DECODE) == 20.0


def test_long_times_are_forgotten() -> None:
    assert learned((DECODE, 60.0), *[(DECODE, 0.01)] * 64).limit(DECODE) == FLOOR


def test_prefill_and_decode_differ_and_so_do_sizes() -> None:
    deadlines = learned((DECODE, 0.1), (Work(PREFILL, 256), 3.0))

    assert deadlines.limit(DECODE) == FLOOR
    assert deadlines.limit(Work(PREFILL, 256)) == 60.0
    assert deadlines.limit(Work(PREFILL, 2048)) == 480.0
    assert deadlines.limit(Work(PREFILL, 1)) == 60.0  # never measured: no less than larger ones


def test_before_any_measurement_the_prediction_counts_generously() -> None:
    assert learned().limit(Work(PREFILL, 2048)) == 33 * 4 * FLOOR  # without any
    assert learned(decode=0.001).limit(DECODE) == 4 * FLOOR
    assert learned(decode=1.0).limit(DECODE) == 200.0
    assert learned(prefill=0.01).limit(Work(PREFILL, 512)) == 1024.0


def test_loading_is_given_the_time_of_a_slow_disk_whatever_was_measured() -> None:
    deadlines = learned((Work(LOAD, 10**9), 0.2))

    assert deadlines.limit(Work(LOAD, 6 * 10**9)) == 4 * FLOOR + 600


@pytest.mark.parametrize("text", ["", "soon", "-1"])
def test_a_floor_that_is_none_is_not_taken(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)

    assert WorkDeadlines().limit(DECODE) > 0


def test_a_stall_ends_when_something_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stall, seen = Stall(1.0), []
    for mark in (1, 1, 1, 2, 2, None, 2, 2):
        seen.append(stall.look(mark))
        now += 1.0

    assert seen == [0, 1, 2, 0, 1, 0, 0, 1]


def test_time_in_which_nobody_looked_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slept, or this process was stopped: the other side has had no chance."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stall = Stall(1.0)
    stall.look(1)

    now = 3600.0

    assert stall.look(1) == 2.0
