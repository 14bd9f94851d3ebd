"""Which answers of a served model count, and what is kept of them."""

import asyncio
from pathlib import Path

import pytest

from coordinator.learned import Learned
from coordinator.links import Network
from coordinator.placement import Machine, Stage
from coordinator.stages import Span, stages
from coordinator.timing import RECENT, TOKENS, Timing
from tests.cluster import until
from tests.fleets import GB, a_layout
from unicluster.v1.chat_pb2 import Finish, Timings, Usage

ANN = Machine("ann", "", 20 * GB, 100e9)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, ...]:
    """Ten layers on one machine; what is learnt goes to a folder of its own."""
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    return stages(a_layout([GB] * 10), Network(), [Span(ANN, 0, 10)])


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


async def test_what_counts_is_kept(alone: tuple[Stage, ...]) -> None:
    timing = Timing("it", alone)
    keeping = asyncio.create_task(timing.keep())
    with timing.answer() as finished:
        finished(an_end(0.5))

    await asyncio.to_thread(until, lambda: "ann" in Learned.load().stages, "it is kept")
    keeping.cancel()

    assert Learned.load().stages["ann"]["it"].seconds_per_token == pytest.approx(0.5)
