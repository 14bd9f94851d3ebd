"""Surveys: what counts as a better plan, and that noise of measurements moves nothing."""

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.commands import serve
from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Plan
from coordinator.planning.planner import plan
from coordinator.planning.variants import ModelVariants
from coordinator.recovery.keeping import keeping
from coordinator.recovery.survey import MARGIN, Survey, has_grown, offers, survey
from coordinator.state.cut import Cut
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.errors import InputError

LAYOUT = a_layout([GB] * 24, head=GB)
VARIANTS = ModelVariants(LAYOUT)


def fleet(count: int, bandwidth: float = 100e9, size: int = 12) -> list[Machine]:
    return [a_machine(f"m{i}", size * GB, bandwidth) for i in range(count)]


def surveyed(served: Plan, machines: list[Machine], margin: float = MARGIN) -> Survey | None:
    best = plan(LAYOUT, machines)
    return survey(best, served.stages, VARIANTS, machines, Network(), margin)


def ranges(of: Plan) -> set[tuple[str, int, int]]:
    return {(stage.machine.name, stage.first, stage.end) for stage in of.stages}


def test_a_machine_that_is_much_faster_is_a_gain() -> None:
    machines = fleet(3)
    found = surveyed(plan(LAYOUT, machines), [*machines, a_machine("fast", 40 * GB, 800e9)])

    assert found is not None
    assert ranges(found.better) == {("fast", 0, 24)}
    assert 0.8 < found.gain < 0.95


def test_an_equal_machine_is_none_and_changes_nothing() -> None:
    served = plan(LAYOUT, fleet(3))
    found = surveyed(served, fleet(4))

    assert found is not None
    assert found.gain == 0
    assert ranges(found.better) == ranges(served)


def test_a_plan_that_has_lost_a_machine_does_not_stand() -> None:
    served = plan(LAYOUT, fleet(3))

    assert surveyed(served, [m for m in fleet(5) if m.name != "m1"]) is None


def noisy(machines: list[Machine], chance: random.Random) -> list[Machine]:
    """The machines, measured again: by up to 4 % otherwise, as equal machines are."""
    return [
        m.with_speeds(
            {
                e: replace(s, bandwidth=s.bandwidth * chance.uniform(0.96, 1.04))
                for e, s in m.engines.items()
            }
        )
        for m in machines
    ]


def test_noise_is_no_gain_that_counts() -> None:
    chance = random.Random(7)
    served = plan(LAYOUT, fleet(3))
    for _ in range(8):
        found = surveyed(served, noisy(fleet(5), chance))
        assert found is not None
        assert found.gain < MARGIN


def test_layers_stay_where_they_were_from_one_start_to_the_next() -> None:
    """Among equal machines the best plan is another one each time that they are measured."""
    chance = random.Random(7)
    last = plan(LAYOUT, noisy(fleet(5), chance))
    kept = Cut.from_json(Cut.of(last).to_json()).plan
    best_ones = set()
    for _ in range(10):
        machines = noisy(fleet(5), chance)
        best = plan(LAYOUT, machines)
        best_ones.add(frozenset(ranges(best)))
        found = keeping(best, kept.stages, VARIANTS, machines, Network())
        assert ranges(found) == ranges(last)

    assert len(best_ones) > 1


def test_machines_that_were_there_have_not_come() -> None:
    machines = fleet(3)
    known = offers(machines)

    assert not has_grown(known, machines)
    assert not has_grown(known, machines[:2])
    assert not has_grown(known, [m.with_usable(m.usable * 21 // 20) for m in machines])
    assert has_grown(known, fleet(4))


def test_a_machine_that_was_drained_and_is_not_any_more_has_come() -> None:
    machines = fleet(3)
    known = offers([machines[0].with_usable(0), *machines[1:]])

    assert has_grown(known, machines)


@pytest.mark.parametrize("text", ["0", "0.5", "100", "-5", "nan", "inf", "always", ""])
def test_a_margin_that_is_none_is_refused(text: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(OPTIONS) | {"rebalance": text}
    with pytest.raises(InputError, match=r"--rebalance .*: a percentage from 1 to 99, or off"):
        serve.run(**arguments, **{"rebalance_after": 60.0} | NUMBERS)


OPTIONS = (
    *("model", "quant", "gguf", "engine", "objective", "nodes", "host", "http_cert", "service"),
    *("metrics_port", "mqtt", "peer", "no_http", "http_plain", "http_name", "http_origin"),
)
NUMBERS: dict[str, Any] = {
    "context": 0,
    "users": 1,
    "grpc_port": 0,
    "http_port": 0,
    "recover": 1.0,
    "orphan_grace": 1.0,
}
