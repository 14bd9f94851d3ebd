"""How large prefill chunks are."""

from dataclasses import dataclass

import pytest

from node.generation.chunking import GAP, LEAST_TOKENS, Beginning, Pace


def cost(tokens: int, knee: int) -> float:
    return 0.001 * (tokens + knee)


def through(prompt: int, chunk: int, stages: int, knee: int) -> float:
    """Seconds until so many chunks are through all stages."""
    return (prompt / chunk + stages - 1) * cost(chunk, knee)


@pytest.mark.parametrize("knee", [1, 20, 300])
@pytest.mark.parametrize("stages", [2, 4, 16])
def test_chunks_become_those_that_bring_a_prompt_through_soonest(stages: int, knee: int) -> None:
    pace = Pace(512, stages)
    for _ in range(8):
        few, more = pace.chunk(4096, False, first=True), pace.chunk(4096, False)
        pace.compare(few, cost(few, knee), more, cost(more, knee))

    best = min(through(4096, size, stages, knee) for size in range(LEAST_TOKENS, 513))
    assert through(4096, pace.chunk(4096, False), stages, knee) < 1.02 * best


@dataclass
class Way:
    slowest_s: float | None = None


def test_the_slowest_machine_sets_the_pace_once_its_chunks_are_back() -> None:
    pace, began = Pace(512, stages=4), Beginning()
    ways = [Way(), Way()]
    few, more = pace.chunk(4096, False, first=True), pace.chunk(4096, False)
    for tokens, way in zip((few, more), ways, strict=True):
        began.add(tokens, here_s=0.001 * tokens, way=way)  # the head alone would want small ones
    began.tell(pace)
    before = pace.chunk(4096, False)

    for way in ways:
        way.slowest_s = 1.0  # another machine takes as long for any
    began.tell(pace)
    after = pace.chunk(4096, False)
    began.tell(pace)

    assert before == more
    assert pace.chunk(4096, False) == after > 1.5 * before


def test_where_a_chunk_s_size_costs_nothing_chunks_are_as_large_as_allowed() -> None:
    pace = Pace(512, stages=4)
    for _ in range(8):
        pace.compare(pace.chunk(4096, False, first=True), 0.5, pace.chunk(4096, False), 0.5)

    assert pace.chunk(4096, False) == 512


def test_one_machine_computes_as_much_at_a_time_as_allowed() -> None:
    assert Pace(512, stages=1).chunk(4096, decoding=False) == 512


def test_chunks_shrink_until_answers_wait_no_longer_than_they_should() -> None:
    pace, per_token = Pace(512, stages=1), 0.01
    for _ in range(50):
        pace.note(pace.chunk(4096, decoding=True) * per_token, prefilling=True)

    assert pace.chunk(4096, decoding=True) * per_token == pytest.approx(GAP, rel=0.3)


def test_chunks_grow_where_there_is_time() -> None:
    pace = Pace(512, stages=1)
    for _ in range(50):
        pace.note(0.01, prefilling=True)

    assert pace.chunk(4096, decoding=True) == 512


def test_slow_answers_may_wait_longer() -> None:
    pace = Pace(512, stages=1)
    pace.note(GAP, prefilling=False)  # what a token takes undisturbed
    for _ in range(50):
        pace.note(2 * GAP, prefilling=True)

    assert pace.chunk(4096, decoding=True) == 512
