"""Which answers of a served model count, and what is kept of them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.fleet.measured import Measurements
from coordinator.fleet.timing import RECENT, TOKENS, Timing
from coordinator.planning.links import Network
from coordinator.planning.placement import Stage
from coordinator.planning.stages import Span, stages
from tests.support.cluster import until
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.v1.chat_pb2 import Finish, Measured, Timings, Usage
from unicluster.v1.meters_pb2 import HopMeter, Meters, StageMeter

ANN = a_machine("ann", 20 * GB, 100e9)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, ...]:
    """Ten layers on one machine; what is learnt goes to a folder of its own."""
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    return stages(Network(), [Span(ANN, 0, 10, a_layout([GB] * 10))])


def an_end(seconds_per_token: float, tokens: int = TOKENS) -> Finish:
    return Finish(
        reason="length",
        usage=Usage(completion_tokens=tokens),
        timings=Timings(tokens_per_s=1 / seconds_per_token),
    )


def test_the_median_of_recent_answers_counts(alone: tuple[Stage, ...]) -> None:
    timing = Timing("it", alone)
    for seconds in [9.0] * RECENT + [0.1, 0.2, 0.3] * (RECENT // 3):
        with timing.answer() as finished:
            finished(an_end(seconds))

    assert timing.seconds_per_token == pytest.approx(0.2)


def test_answers_that_shared_the_machines_do_not_count(alone: tuple[Stage, ...]) -> None:
    timing = Timing("it", alone)
    with timing.answer() as first, timing.answer() as second:
        second(an_end(0.5))
        first(an_end(0.5))

    assert timing.seconds_per_token is None


def test_short_answers_do_not_count(alone: tuple[Stage, ...]) -> None:
    timing = Timing("it", alone)
    with timing.answer() as finished:
        finished(an_end(0.5, tokens=TOKENS - 1))

    assert timing.seconds_per_token is None


async def stored_of(stages: tuple[Stage, ...], measured: Measured, seconds: float) -> Measurements:
    """Measurements stored after an answer with so many seconds a token."""

    async def measure() -> Measured:
        return measured

    timing = Timing("it", stages)
    keeping = asyncio.create_task(timing.keep(measure))
    with timing.answer() as finished:
        finished(an_end(seconds))
    await asyncio.to_thread(until, lambda: "ann" in Measurements.load().stages, "it is kept")
    keeping.cancel()
    return Measurements.load()


async def test_answers_that_count_are_stored(alone: tuple[Stage, ...]) -> None:
    known = await stored_of(alone, Measured(), 0.5)

    assert known.stages["ann"]["it"].seconds_per_token == pytest.approx(0.5)


async def test_each_stage_and_hop_is_stored_as_it_reports(alone: tuple[Stage, ...]) -> None:
    bob = replace(ANN, name="bob")
    layout = a_layout([GB] * 10)
    two = stages(Network(), [Span(ANN, 0, 5, layout), Span(bob, 5, 10, layout)])
    meters = Meters(
        stages=[StageMeter(decode_s=0.1), StageMeter(decode_s=0.3)],
        hops=[HopMeter(decode_s=0.01), HopMeter(decode_s=0.03)],
    )

    known = await stored_of(two, Measured(meters=meters), 0.5)

    assert known.stages["ann"]["it"].seconds_per_token == pytest.approx(0.16)  # with the rest
    assert known.stages["bob"]["it"].seconds_per_token == pytest.approx(0.3)
    assert known.hops == {"ann bob": pytest.approx(0.02)}
