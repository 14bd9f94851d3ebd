"""A trace's spans of one trip: every hand-over by name, whatever machines say of their times."""

import math
from itertools import pairwise

import pytest

from node.metering.timeline import Timeline
from node.metering.trips import Trip, Trips
from unicluster.v1.meters_pb2 import Trace
from unicluster.v1.stage_pb2 import StageReport

WAY = [
    *(("handing", 0), ("wire", 1), ("queue", 1), ("layers", 1)),
    *(("handing", 1), ("wire", 2), ("queue", 2), ("layers", 2)),
    *(("handing", 2), ("wire", 0)),
]


def traced(*handed: float) -> Trace:
    """A trip over two stages from 1.0 to 2.0 s, all by one clock, each hop of 0.1 s."""
    timeline, ring = Timeline(0.0), Trips(["head", "a", "b"])
    for machine in (1, 2):
        ring.clocks.record(machine, 0.0, 0.0, 0.0)
    reports = [
        StageReport(stage=1, arrived_s=1.1, queue_s=0.05, compute_s=0.25, handed_s=handed[0]),
        StageReport(stage=2, arrived_s=1.5, queue_s=0.05, compute_s=0.35, handed_s=handed[1]),
    ]
    timeline.note(7, Trip(1.0, 2.0, 0, True, reports, handed_s=handed[2]), ring)
    return timeline.to_wire()


def test_a_hop_is_handing_wire_and_queue() -> None:
    spans = sorted((s for s in traced(0.01, 0.02, 0.03).spans if s.trip), key=lambda s: s.start_s)

    assert [(s.name, s.stage) for s in spans] == WAY
    assert [s.start_s for s in spans] == pytest.approx(
        [1.0, 1.01, 1.1, 1.15, 1.4, 1.42, 1.5, 1.55, 1.9, 1.93]
    )
    assert all(a.start_s + a.duration_s == pytest.approx(b.start_s) for a, b in pairwise(spans))


@pytest.mark.parametrize("said", [0.0, -5.0, 99.0, math.inf, -math.inf, math.nan])
def test_no_machine_s_word_makes_a_span_of_impossible_length(said: float) -> None:
    spans = [s for s in traced(said, said, said).spans if s.trip]

    assert len(spans) == len(WAY)
    handings = [s for s in spans if s.name == "handing"]
    assert all(s.duration_s >= 0 for s in handings)
