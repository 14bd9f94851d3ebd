"""Frames that were cancelled: skipped, passed on, and taken off the next trim."""

import numpy as np
import pytest

from node.metering.meters import StageMeter
from node.ring.bounds import MOST_CANCELLED, FrameError
from node.ring.session import CancelledFrames
from node.speculation.depth import MOST_FRAMES, PipeTimes
from tests.support.stage_head import StageHead, op
from tests.unit.test_frame_checks import Heads, of_ggml, of_mlx
from unicluster.v1.stage_pb2 import Frame


@pytest.fixture(scope="module", params=["mlx", "ggml"])
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Heads:
    folder = tmp_path_factory.mktemp(request.param)
    return of_mlx(folder, "llama") if request.param == "mlx" else of_ggml(folder, "llama", 2)


def begun(heads: Heads, tokens: int = 5) -> StageHead:
    head = heads()
    head.forward(1, 1, tokens, op(1, "make"))
    return head


def output(frame: Frame) -> bytes:
    return frame.hidden[0].tensor.data


def test_a_cancelled_frame_carries_its_operations_out_and_no_tokens(heads: Heads) -> None:
    head = begun(heads)
    head.session.cancelled.add([2])

    skipped = head.forward(1, 1, 1, op(2, "make"))

    assert skipped.skipped == 1
    assert not skipped.hidden
    assert skipped.reports[0].skipped
    assert 2 in head.session.caches
    assert head.report(op(1, "trim", tokens=1, guessed=True), op(1, "query")).answer.size == 5
    head.end()


@pytest.mark.parametrize("cancelled", [[], [3], [2, 3]])
def test_what_follows_is_that_of_a_cache_without_the_guesses(
    heads: Heads, cancelled: list[int]
) -> None:
    plain = begun(heads)
    wanted = output(plain.forward(1, 1, 1))
    plain.end()
    head = begun(heads)
    head.session.cancelled.add(cancelled)
    head.forward(1, 1, 1)
    head.forward(1, 1, 1)

    frame = head.forward(1, 1, 1, op(1, "trim", tokens=2, guessed=True))

    got, expected = (np.frombuffer(data, np.float32) for data in (output(frame), wanted))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    head.end()


@pytest.mark.parametrize("cancelled", [[], [3], [2, 3]])
def test_a_snapshot_is_put_back_whatever_was_skipped(heads: Heads, cancelled: list[int]) -> None:
    head = begun(heads)
    head.session.cancelled.add(cancelled)
    head.forward(1, 1, 1, op(7, "snapshot", source=1))
    head.forward(1, 1, 1)

    report = head.report(op(1, "restore", snapshot=7, tokens=2), op(1, "query"))

    assert report.answer.size == 5
    head.end()


def test_a_frame_that_was_skipped_before_is_skipped_here(heads: Heads) -> None:
    head = begun(heads)

    frame = head.send(cache=1, skipped=1)

    assert frame.reports[0].skipped
    head.end()


def test_frames_that_contradict_it_are_refused(heads: Heads) -> None:
    head = begun(heads)
    head.session.cancelled.add([2])
    head.forward(1, 1, 1)

    with pytest.raises(FrameError, match="1 tokens before it were skipped"):
        head.forward(1, 1, 1)
    with pytest.raises(FrameError, match="0 tokens, of which 1 were skipped"):
        head.send(op(1, "trim", tokens=0, guessed=True))
    with pytest.raises(FrameError, match="was skipped, and has a hidden state"):
        head.forward(1, 1, 1, skipped=1)
    head.end()


def test_a_chunk_of_a_prompt_is_never_skipped(heads: Heads) -> None:
    head = begun(heads)
    head.session.cancelled.add([2])

    assert not head.forward(1, 1, 3, hold=True).skipped
    head.end()


def test_numbers_are_forgotten_with_their_frames() -> None:
    cancelled = CancelledFrames()
    cancelled.add([4, 5, 6])
    cancelled.served(5)
    cancelled.add([3, 5])

    assert [number in cancelled for number in (3, 4, 5, 6)] == [False, False, False, True]
    with pytest.raises(FrameError, match="frames are cancelled"):
        cancelled.add(range(10, 11 + MOST_CANCELLED))


@pytest.mark.parametrize(
    ("stages", "hops", "depth"),
    [
        ((0.02, 0.02, 0.02), 0.002, 3),
        ((0.02, 0.0, 0.0), 0.0, 3),  # two are not measured yet
        ((0.05, 0.01, 0.01), 0.001, 1),  # the head is the bottleneck
        ((0.01, 0.03, 0.02), 0.0, 2),
        ((0.001, 0.001), 1.0, MOST_FRAMES),
        ((), 0.0, 1),
    ],
)
def test_the_depth_keeps_the_slowest_stage_busy(
    stages: tuple[float, ...], hops: float, depth: int
) -> None:
    assert PipeTimes(stages, hops).depth() == depth


EQUAL = (0.02, 0.02, 0.02)


@pytest.mark.parametrize(
    ("growth", "rate", "frames", "width"),
    [
        (None, 0.9, 3, 1),  # not known what it would cost
        (1.0, 0.9, 3, 1),  # each token reads its own experts: one behind the other
        (0.0, 0.98, 3, 8),  # a frame of several takes no longer
        (0.0, 0.0, 3, 1),  # and helps nothing where guesses are wrong
        (0.9, 0.9, 1, 1),
        (0.02, 0.9, 1, 8),  # with others in the pipe, several in one trip
    ],
)
def test_tokens_of_a_frame_by_what_they_cost(
    growth: float | None, rate: float, frames: int, width: int
) -> None:
    assert PipeTimes(EQUAL, 0.0, growth).width(rate, frames, 8) == width


def test_the_speed_of_a_full_pipe_is_that_of_the_formula() -> None:
    pipe, tokens = PipeTimes(EQUAL), 10
    assert pipe.speed(0.9, 3, 1) * pipe.trip == pytest.approx(tokens * 3 / (3 + tokens - 1))
    assert pipe.speed(0.9, 1, 1) * pipe.trip == pytest.approx(1)  # nothing beside it in the pipe


def test_growth_is_what_further_tokens_add_to_a_stage() -> None:
    meter = StageMeter()
    meter.note_drafted(3, 0.05)  # nothing to compare with yet
    meter.decode.note(0.02)
    meter.note_drafted(3, 0.05)

    assert meter.growth.count == 1
    assert meter.growth.median == pytest.approx(0.5)
