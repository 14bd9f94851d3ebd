"""Plans after a loss, by which what need not move stays where it is."""

from dataclasses import replace

import pytest

from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout, Objective, Plan
from coordinator.planning.planner import plan
from coordinator.planning.variants import ModelVariants
from coordinator.recovery.keeping import WORSE, keeping
from tests.support.fleets import GB, a_layout, a_machine

LAYOUT = a_layout([GB] * 24, head=GB)


def fleet(*sizes: int, bandwidth: float = 100e9) -> list[Machine]:
    return [a_machine(f"m{i}", size * GB, bandwidth) for i, size in enumerate(sizes)]


def ranges(of: Plan) -> set[tuple[str, int, int]]:
    return {(stage.machine.name, stage.first, stage.end) for stage in of.stages}


def after_loss(
    served: Plan, lost: str, machines: list[Machine], layout: Layout = LAYOUT
) -> tuple[Plan, Plan]:
    """The best plan without a machine, and that which keeps what can stay."""
    left = [machine for machine in machines if machine.name != lost]
    best = plan(layout, left, served.objective)
    return best, keeping(best, served.stages, ModelVariants(layout), left, Network())


def assert_covers(found: Plan, layout: Layout = LAYOUT) -> None:
    ends = [stage.end for stage in found.stages]
    assert [stage.first for stage in found.stages] == [0, *ends[:-1]]
    assert ends[-1] == layout.layers
    assert all(stage.bytes <= stage.machine.usable for stage in found.stages)
    assert len({stage.machine.name for stage in found.stages}) == len(found.stages)
    assert found.stages[0].head
    assert not any(stage.head for stage in found.stages[1:])


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_spare_machine_takes_the_lost_range_and_no_other(
    objective: Objective, place: int
) -> None:
    machines = fleet(12, 12, 12, 12)
    served = plan(LAYOUT, machines[:3], objective)
    lost = served.stages[place]

    _, found = after_loss(served, lost.machine.name, machines)

    assert_covers(found)
    kept = ranges(served) - {(lost.machine.name, lost.first, lost.end)}
    assert ranges(found) == kept | {("m3", lost.first, lost.end)}


def test_without_a_spare_machine_the_neighbours_take_the_range() -> None:
    machines = fleet(12, 12, 12, 12)
    served = plan(a_layout([GB] * 36, head=GB), machines)
    small = a_layout([GB] * 24, head=GB)
    served = plan(small, [m.with_usable(8 * GB) for m in machines])
    assert len(served.stages) == 4
    lost = served.stages[1]

    _, found = after_loss(served, lost.machine.name, machines, small)

    assert_covers(found, small)
    assert len(ranges(found) & ranges(served)) >= 1


def test_a_plan_that_is_much_faster_is_taken_all_the_same() -> None:
    machines = fleet(12, 12, 12)
    served = plan(LAYOUT, machines)
    fast = [*machines, a_machine("fast", 40 * GB, 800e9)]

    best, found = after_loss(served, served.stages[1].machine.name, fast)

    assert found == best
    assert ranges(found) == {("fast", 0, 24)}


@pytest.mark.parametrize("slower", [0.5, 0.97])
def test_a_plan_is_kept_within_a_margin(slower: float) -> None:
    machines = fleet(12, 12, 12)
    served = plan(LAYOUT, machines)
    lost = served.stages[2].machine
    spare = replace(lost, name="spare").with_usable(12 * GB)
    spare = a_machine("spare", 12 * GB, 100e9 * slower)
    best, found = after_loss(served, lost.name, [*machines, spare])
    assert found.seconds_per_token <= best.seconds_per_token * (1 + WORSE)
    assert_covers(found)


def test_one_that_drains_is_as_good_as_lost() -> None:
    machines = fleet(12, 12, 12, 12)
    served = plan(LAYOUT, machines[:3])
    drained = served.stages[1].machine.name
    left = [m.with_usable(0) if m.name == drained else m for m in machines]
    best = plan(LAYOUT, left)

    found = keeping(best, served.stages, ModelVariants(LAYOUT), left, Network())

    assert drained not in {name for name, _, _ in ranges(found)}
    assert len(ranges(found) & ranges(served)) == 2
    assert {m.name for m, _ in found.left_out} == {drained}


def test_without_anything_served_it_is_the_best() -> None:
    best = plan(LAYOUT, fleet(12, 12, 12))
    assert keeping(best, (), ModelVariants(LAYOUT), fleet(12, 12, 12), Network()) == best
