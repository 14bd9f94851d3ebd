"""How large prefill chunks are."""

import pytest

from node.pace import CHUNKS_PER_STAGE, GAP, LEAST_TOKENS, Pace


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_a_prompt_is_cut_so_that_all_stages_are_busy_most_of_the_time(stages: int) -> None:
    chunk = Pace(512, stages).chunk(4096, decoding=False)

    assert 4096 / chunk <= CHUNKS_PER_STAGE * (stages - 1)
    assert chunk >= LEAST_TOKENS


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
