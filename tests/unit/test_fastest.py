"""The fastest of several settings, found while work goes on."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.metering.fastest import BETTER, BLOCKS, MOST_REST, STEPS, Fastest, doublings


def work(fastest: Fastest, cost: Callable[[int], float], steps: int = 200) -> list[int]:
    """Settings of so many steps, each of which takes `cost(setting)` seconds."""
    used = []
    for _ in range(steps):
        used.append(fastest.setting)
        fastest.note(1, cost(fastest.setting))
    return used


@pytest.mark.parametrize(("most", "settings"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_numbers_of_threads_are_doubled_up_to_all_cores(most: int, settings: list[int]) -> None:
    assert doublings(most) == settings


@given(best=st.sampled_from(doublings(16)), start=st.sampled_from(doublings(16)))
def test_the_fastest_is_reached_from_anywhere(best: int, start: int) -> None:
    fastest = Fastest(doublings(16), start)
    work(fastest, lambda threads: 0.01 * max(best / threads, threads / best))
    assert fastest.best == best


def test_what_is_no_faster_is_left_alone_and_tried_ever_more_rarely() -> None:
    fastest = Fastest([1, 2, 4], 2)
    used = work(fastest, lambda threads: 0.01 if threads == 2 else 0.01 * BETTER, 8 * MOST_REST)
    assert fastest.best == 2
    assert 0 < sum(threads != 2 for threads in used) < 0.03 * len(used)


def test_other_work_on_the_machine_is_noticed_when_it_comes_and_when_it_goes() -> None:
    fastest = Fastest(doublings(4), 4)
    work(fastest, lambda threads: 1 / threads)
    quiet = fastest.best
    work(fastest, lambda threads: float(threads**2), 2 * MOST_REST)
    busy = fastest.best
    work(fastest, lambda threads: 1 / threads, 2 * MOST_REST)
    assert (quiet, busy, fastest.best) == (4, 1, 4)


def test_steps_of_other_kinds_are_not_compared() -> None:
    """An answer alone, and one beside seven others, which takes longer with any setting."""
    fastest = Fastest([1, 2], 2)
    for number in range(500):
        rows = 8 if number % 5 else 1
        fastest.note(rows, 0.01 * rows)
    assert fastest.best == 2


def test_one_setting_needs_no_trial() -> None:
    assert set(work(Fastest([1], 1), lambda _: 1.0)) == {1}


def steps_until(fastest: Fastest, best: int, cost: Callable[[int], float], most: int) -> int:
    """Steps until that setting is the best one."""
    for number in range(most):
        if fastest.best == best:
            return number
        fastest.note(1, cost(fastest.setting))
    raise AssertionError(f"{fastest.best} is still the best after {most} steps")


@pytest.mark.parametrize("rests", [0, 500, 20_000])
def test_cores_that_are_taken_are_noticed_within_an_answer(rests: int) -> None:
    fastest = Fastest(doublings(4), 4)
    work(fastest, lambda threads: 1 / threads, 200 + rests)
    assert fastest.best == 4

    assert steps_until(fastest, 1, lambda threads: 0.3 * threads, 150)


def test_steps_that_grow_with_the_answer_are_no_reason_for_a_trial() -> None:
    fastest = Fastest([1, 2], 2)
    work(fastest, lambda threads: 1 / threads)
    times = iter(1 + number / 1000 for number in range(4000))

    used = work(fastest, lambda threads: next(times) / threads, 4000)

    # Those of four trials whose rests double are allowed, and no more.
    assert used.count(1) <= 5 * BLOCKS * STEPS


def test_times_that_jump_without_end_cause_few_trials() -> None:
    random = Random(7)
    fastest = Fastest([1, 2], 2)

    used = work(fastest, lambda threads: random.choice([1, 1, 1, 9]) / threads, 20_000)

    assert sum(a != b for a, b in pairwise(used)) < 0.02 * len(used)


def test_a_setting_that_takes_many_times_as_long_is_given_up_at_once() -> None:
    fastest = Fastest([1, 2], 1)

    used = work(fastest, lambda threads: 1.0 if threads == 1 else 20.0, 60)

    assert used.count(2) == 2  # one that doesn't count, and one that does


def test_a_trial_goes_on_with_the_kind_of_steps_that_come() -> None:
    fastest = Fastest([1, 2], 2)
    fastest.note(15, 1.0)
    for _ in range(60):
        fastest.note(1, 1.0 * fastest.setting)

    assert fastest.best == 1
    assert fastest.settled
