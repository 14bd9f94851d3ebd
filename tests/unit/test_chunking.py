"""Sizes of prefill chunks."""

from dataclasses import dataclass

import pytest

from node.generation.chunking import MAX_INTER_TOKEN_S, MIN_TOKENS, ChunkSizer, FirstChunks


def cost(tokens: int, crossover: int) -> float:
    return 0.001 * (tokens + crossover)


def through(prompt: int, chunk: int, stages: int, crossover: int) -> float:
    """Seconds until so many chunks are through all stages."""
    return (prompt / chunk + stages - 1) * cost(chunk, crossover)


@pytest.mark.parametrize("crossover", [1, 20, 300])
@pytest.mark.parametrize("stages", [2, 4, 16])
def test_chunks_converge_to_the_fastest_prefill(stages: int, crossover: int) -> None:
    sizer = ChunkSizer(512, stages)
    for _ in range(8):
        small, large = sizer.chunk(4096, False, first=True), sizer.chunk(4096, False)
        sizer.compare(small, cost(small, crossover), large, cost(large, crossover))

    best = min(through(4096, size, stages, crossover) for size in range(MIN_TOKENS, 513))
    assert through(4096, sizer.chunk(4096, False), stages, crossover) < 1.02 * best


@dataclass
class FrameProgress:
    slowest_s: float | None = None


def test_the_slowest_machine_sets_the_chunk_size_once_its_chunks_are_back() -> None:
    sizer, first_chunks = ChunkSizer(512, stages=4), FirstChunks()
    progresses = [FrameProgress(), FrameProgress()]
    small, large = sizer.chunk(4096, False, first=True), sizer.chunk(4096, False)
    for tokens, progress in zip((small, large), progresses, strict=True):
        # By the head's times alone small chunks would be best.
        first_chunks.add(tokens, here_s=0.001 * tokens, progress=progress)
    first_chunks.report(sizer)
    before = sizer.chunk(4096, False)

    for progress in progresses:
        progress.slowest_s = 1.0  # another machine takes as long for any
    first_chunks.report(sizer)
    after = sizer.chunk(4096, False)
    first_chunks.report(sizer)

    assert before == large
    assert sizer.chunk(4096, False) == after > 1.5 * before


def test_where_a_chunk_s_size_costs_nothing_chunks_are_as_large_as_allowed() -> None:
    sizer = ChunkSizer(512, stages=4)
    for _ in range(8):
        sizer.compare(sizer.chunk(4096, False, first=True), 0.5, sizer.chunk(4096, False), 0.5)

    assert sizer.chunk(4096, False) == 512


def test_one_machine_computes_as_much_at_a_time_as_allowed() -> None:
    assert ChunkSizer(512, stages=1).chunk(4096, decoding=False) == 512


def test_chunks_shrink_until_answers_wait_no_longer_than_they_should() -> None:
    sizer, per_token = ChunkSizer(512, stages=1), 0.01
    for _ in range(50):
        sizer.note(sizer.chunk(4096, decoding=True) * per_token, prefilling=True)

    assert sizer.chunk(4096, decoding=True) * per_token == pytest.approx(MAX_INTER_TOKEN_S, rel=0.3)


def test_chunks_grow_where_there_is_time() -> None:
    sizer = ChunkSizer(512, stages=1)
    for _ in range(50):
        sizer.note(0.01, prefilling=True)

    assert sizer.chunk(4096, decoding=True) == 512


def test_slow_answers_may_wait_longer() -> None:
    sizer = ChunkSizer(512, stages=1)
    sizer.note(MAX_INTER_TOKEN_S, prefilling=False)  # what a token takes undisturbed
    for _ in range(50):
        sizer.note(2 * MAX_INTER_TOKEN_S, prefilling=True)

    assert sizer.chunk(4096, decoding=True) == 512
