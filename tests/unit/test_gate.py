"""Whether guessing pays: an answer's rate of right guesses, against what was measured."""

import pytest

from node.speculation.gate import (
    ENOUGH,
    LEAST_RATE,
    NEVER,
    PROBE_TOKENS,
    Gate,
    PipedTimes,
    TripTimes,
)


def piped(plain: float, right: float, wrong: float) -> PipedTimes:
    times = PipedTimes()
    for _ in range(ENOUGH):
        times.plain.note(plain)
        times.right.note(right)
        times.wrong.note(wrong)
    times.weigh()
    return times


@pytest.mark.parametrize(
    ("plain", "right", "wrong", "least"),
    [
        (0.04, 0.02, 0.06, 0.5),  # a wrong guess costs as much as a right one saves
        (0.08, 0.02, 0.10, 0.25),
        (0.04, 0.02, 0.04, LEAST_RATE),  # a wrong one costs nothing
        (0.04, 0.04, 0.06, NEVER),  # a right one saves nothing
    ],
)
def test_the_rate_from_which_guesses_pay(
    plain: float, right: float, wrong: float, least: float
) -> None:
    assert piped(plain, right, wrong).least_rate == pytest.approx(least)


def test_until_a_kind_of_step_is_measured_the_stages_times_stand_for_it() -> None:
    times = PipedTimes(unknown=0.7)
    for _ in range(ENOUGH):
        times.wrong.note(0.06)
    times.weigh()
    assert times.least_rate == 0.7  # nothing to compare with

    times.expected = 0.04, 0.02
    times.weigh()
    assert times.least_rate == pytest.approx(0.5)


def test_wrong_guesses_are_expected_to_cost_something() -> None:
    times = PipedTimes()
    times.expected = 0.04, 0.02

    times.weigh()

    assert times.least_rate == pytest.approx(1 / 3)


def test_guesses_that_slow_down_what_they_follow_have_to_be_right_more_often() -> None:
    times = piped(plain=0.04, right=0.02, wrong=0.06)
    for _ in range(ENOUGH):
        times.behind.note(0.06)

    times.weigh()

    assert times.least_rate == pytest.approx(2 / 3)


def test_what_is_compared_anyway_is_not_sent_before_it_would_pay() -> None:
    gate = Gate(lambda: 0.5, (0.2, 0.5), closed=True)
    assert not gate.is_open(0)
    assert not gate.is_open(1)

    for _ in range(20):
        gate.note(0, right=False)
        gate.note(1, right=True)

    assert not gate.is_open(0)
    assert gate.is_open(1)


def test_what_is_seen_to_be_wrong_is_not_even_tried() -> None:
    gate = Gate(lambda: 0.5, closed=True)
    for _ in range(20):
        gate.note(right=False)
    for _ in range(2 * PROBE_TOKENS):
        gate.next_token()
        assert not gate.lets_pass()


def test_guessing_ends_where_guesses_are_rarely_right_and_begins_again() -> None:
    gate = Gate(lambda: 0.5)
    assert gate.is_open()
    for _ in range(4):
        gate.note(right=False)
    assert not gate.is_open()

    right = 0
    while not gate.is_open():
        gate.note(right=True)
        right += 1
        assert right < 100
    assert gate.rate() >= 0.6  # not as soon as it would pay: it would flutter


def test_now_and_then_one_is_tried() -> None:
    gate = Gate(lambda: NEVER)
    gate.note(right=True)
    tried = 0
    for _ in range(10 * PROBE_TOKENS):
        gate.next_token()
        tried += gate.lets_pass()

    assert tried == 10


def test_several_tokens_in_one_trip_pay_by_what_one_more_costs() -> None:
    times = TripTimes()
    for _ in range(ENOUGH):
        times.note(0, 0.010)
    assert times.least_rate == LEAST_RATE
    for _ in range(3):
        times.note(4, 0.026)  # four more, each 0.4 of the first

    assert times.least_rate == pytest.approx(0.4)
