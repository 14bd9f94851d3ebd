"""Placements for models with a draft whose guesses fill the pipe."""

from dataclasses import replace
from itertools import combinations

import pytest

from coordinator.planning.filling import DRAFT_RATE, draft_seconds
from coordinator.planning.links import LINKS, Network
from coordinator.planning.placement import Layout, Plan, guessing_seconds
from coordinator.planning.planner import plan
from coordinator.planning.stages import Span, stages
from tests.support.fleets import GB, a_layout, a_machine

LAYERS = 24
FLEET = [a_machine(f"m{number}", 11 * GB, 100e9) for number in range(4)]


def with_draft(read: int = 3 * GB, rate: float = DRAFT_RATE) -> Layout:
    return a_layout([GB] * LAYERS, head=0).with_draft(GB // 2, read, rate)


def seconds(planned: Plan) -> float:
    return guessing_seconds(planned.stages, planned.guess_rate, planned.draft_s)


def test_a_head_that_drafts_has_fewer_layers() -> None:
    planned = plan(with_draft(), FLEET)

    head, *others = (stage.end - stage.first for stage in planned.stages)
    assert len(others) == 3
    assert head < min(others)
    assert planned.guess_rate == DRAFT_RATE
    assert planned.guessing_gain > 1.5
    even = plan(with_draft(rate=0.0), FLEET)
    assert even.guess_rate == 0.0
    without = guessing_seconds(even.stages, DRAFT_RATE, planned.draft_s)
    assert seconds(planned) < without * 0.95


def test_drafting_is_no_part_of_a_token_s_trip() -> None:
    planned = plan(with_draft(), FLEET)

    head = planned.stages[0]
    assert planned.draft_s == pytest.approx(draft_seconds(head, with_draft()))
    plain = plan(with_draft(rate=0.0), FLEET)
    trips = [sum(s.seconds_per_token for s in each.stages) for each in (planned, plain)]
    assert trips[0] == pytest.approx(trips[1], rel=0.01)  # alike machines read the same bytes


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("read", [GB, 3 * GB, 8 * GB])
def test_it_is_as_good_as_its_gap_says(rate: float, read: int) -> None:
    layout = with_draft(read, rate)
    network = Network(default=LINKS["10gbe"])
    planned = plan(layout, FLEET, network=network)

    least = seconds(planned)
    for count in (3, 4):
        for cuts in combinations(range(1, LAYERS), count - 1):
            edges = [0, *cuts, LAYERS]
            spans = [
                Span(machine, first, end, layout)
                for machine, first, end in zip(FLEET, edges, edges[1:], strict=False)
            ]
            placed = stages(network, spans)
            if min(stage.free_bytes for stage in placed) < 0:
                continue
            draft = draft_seconds(placed[0], layout)
            least = min(least, guessing_seconds(placed, rate, draft))
    assert least >= seconds(planned) * (1 - planned.gap) * (1 - 1e-9)
    assert least >= seconds(planned) * 0.98


def test_one_machine_has_no_pipe_to_fill() -> None:
    planned = plan(with_draft(), [a_machine("one", 100 * GB, 100e9)])

    assert len(planned.stages) == 1
    assert planned.guess_rate == 0.0


def test_the_formula() -> None:
    planned = replace(plan(with_draft(rate=0.0), FLEET), guess_rate=0.8, draft_s=0.0)

    trip = planned.seconds_per_token
    slowest = planned.slowest.seconds_per_token
    tokens = 1 / (1 - 0.8)
    assert planned.guessing_gain == pytest.approx(tokens * trip / (trip + (tokens - 1) * slowest))
    assert planned.guessing_frames == int(trip / slowest)


def test_guesses_that_would_lose_gain_nothing() -> None:
    planned = replace(plan(with_draft(rate=0.0), FLEET), guess_rate=0.5, draft_s=10.0)
    assert planned.guessing_gain == 1.0
