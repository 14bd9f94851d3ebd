"""Clocks that don't agree, and what frames and questions record of them."""

import random

import pytest

from node.metering.clocks import Clocks, shifts

HOPS = [0.0003, 0.0012, 0.0005]
# Of the machines' clocks to the head's.
OFFSETS = [0.0, 5000.0, -3.25]


def differences(hops: list[float], offsets: list[float] = OFFSETS) -> list[float]:
    """Arrival less departure, each by its own clock."""
    ahead = [b - a for a, b in zip(offsets, [*offsets[1:], offsets[0]], strict=True)]
    return [hop + shift for hop, shift in zip(hops, ahead, strict=True)]


def noisy(source: random.Random) -> list[float]:
    return [hop + source.expovariate(2000) for hop in HOPS]


def test_clocks_that_were_heard_well_show_each_hop() -> None:
    clocks = Clocks(3)
    for machine, offset in enumerate(OFFSETS[1:], start=1):
        clocks.record(machine, asked=1.0, said=1.0 + offset, heard=1.0)

    assert clocks.hops(differences(HOPS), now=2.0) == pytest.approx(HOPS, abs=1e-9)


def test_without_the_clocks_only_their_sum_is_known() -> None:
    measured = Clocks(3).hops(differences(HOPS), now=2.0)

    assert measured == pytest.approx([sum(HOPS) / 3] * 3, abs=1e-9)


def test_the_sum_is_right_and_nothing_negative_whatever_the_clocks_say() -> None:
    source = random.Random(7)
    clocks = Clocks(3)
    clocks.record(1, asked=1.0, said=1.0 + OFFSETS[1] + 0.4, heard=1.5)  # wrong by 0.15
    clocks.record(2, asked=1.0, said=1.0 + OFFSETS[2] - 0.1, heard=1.4)
    trips = [noisy(source) for _ in range(200)]

    measured = [clocks.hops(differences(trip), now=2.0 + i / 1000) for i, trip in enumerate(trips)]

    assert all(hop >= 0 for hops in measured for hop in hops)
    for hops, trip in zip(measured, trips, strict=True):
        assert sum(hops) == pytest.approx(sum(trip), abs=1e-9)


def test_the_answer_that_came_fastest_counts() -> None:
    clocks = Clocks(2)
    clocks.record(1, asked=1.0, said=8.0, heard=1.001)
    clocks.record(1, asked=2.0, said=9.7, heard=2.9)

    assert clocks.offsets[1] == pytest.approx(8.0 - 1.0005)


def test_a_clock_that_drifts_is_followed() -> None:
    clocks = Clocks(2)
    offset = 100.0
    for second in range(120):
        now, offset = 1000.0 + second, offset + 40e-6
        clocks.record(1, asked=now, said=now + offset + 0.0002, heard=now + 0.0004)
        trip = differences([0.0004, 0.0006], [0.0, offset])

        measured = clocks.hops(trip, now)

        assert measured == pytest.approx([0.0004, 0.0006], abs=0.0002)


def test_what_was_known_before_a_pause_does_not_count() -> None:
    clocks = Clocks(2)
    for now, offset in (1000.0, 100.0), (5000.0, 100.2):
        clocks.record(1, asked=now, said=now + offset, heard=now)

        measured = clocks.hops(differences([0.0004, 0.0006], [0.0, offset]), now)

        assert measured == pytest.approx([0.0004, 0.0006], abs=1e-9)


def test_shifts_add_up_to_nothing() -> None:
    measured = shifts(differences(HOPS), [0.0, 4999.0, None])

    assert sum(measured) == pytest.approx(0, abs=1e-9)
