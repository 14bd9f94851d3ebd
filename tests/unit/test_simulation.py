"""The scheduler in simulated time, where costs are known and answers can be worked out."""

from itertools import pairwise

import pytest

from bench import simulate, simulation
from bench.simulation import Cluster, StageCost
from coordinator.planning.links import Link

STEP, HOP, USER, TAIL = 0.010, 0.0003, 0.001, 0.002


def stage(tail: float = 0.0) -> StageCost:
    """10 ms a step and 1 ms for each further answer; a chunk costs 10 ms and 0.1 ms a token."""
    return StageCost(
        decode=lambda answers: STEP + USER * (answers - 1),
        prefill=lambda tokens: STEP + 1e-4 * tokens,
        tail=lambda answers: tail,
    )


def cluster(stages: int, users: int, **options: object) -> Cluster:
    costs = [stage(TAIL), *(stage() for _ in range(stages - 1))]
    links = [Link("x", HOP, float("inf"))] * stages
    return Cluster(costs, links, hidden_bytes=1000, users=users, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_user_alone_waits_for_all_stages_and_hops(stages: int) -> None:
    speed = simulation.speed(cluster(stages, 1), 1, 32)

    assert 1 / speed == pytest.approx(stages * (STEP + HOP) + TAIL)


@pytest.mark.parametrize("users", [4, 16])
def test_many_users_wait_for_the_slowest_stage_only(users: int) -> None:
    speed = simulation.speed(cluster(4, users), users, 64)

    slowest = STEP + USER * (users // 4 - 1) + TAIL
    longest = 4 * (slowest - TAIL + HOP) + TAIL
    assert users / speed == pytest.approx(max(4 * slowest, longest), rel=0.03)


def test_stages_that_share_a_core_gain_nothing_from_lanes() -> None:
    one = simulation.speed(cluster(2, 2, cores=1), 1, 32)
    two = simulation.speed(cluster(2, 2, cores=1), 2, 32)

    assert two == pytest.approx(one, rel=0.1)


def test_a_prompt_is_through_four_stages_sooner_than_through_one() -> None:
    whole, cut = cluster(1, 1), cluster(4, 1)
    for _ in range(4):  # which sets the pace
        seconds = simulation.first_token(cut, 8192)

    # One stage of the whole model takes four times as long.
    assert seconds < 4 * simulation.first_token(whole, 8192) / 2


def test_an_answer_goes_on_while_a_prompt_is_computed() -> None:
    both = cluster(2, 2)
    running = both.ask(32, 400)
    both.world.run(lambda: len(running.at) > 8)
    prompt = both.ask(4096, 1)
    both.hear(prompt)
    at = [time for time in running.at if time > prompt.asked]

    longest = max(later - earlier for earlier, later in pairwise(at))
    assert longest < 0.5
    both.hear(running)


def test_the_page_of_simulations_is_fresh() -> None:
    """A sample: the whole takes minutes."""
    page = (simulate.DOCS / "simulated.md").read_text("utf-8")
    ((count, kind, found),) = simulate.planned([4], ["10 GbE"])

    assert simulate.decode_row(count, kind, found) in page
    assert simulate.prefill_row(count, kind, found) in page
