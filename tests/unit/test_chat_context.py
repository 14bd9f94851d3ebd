"""A chat whose context fills up: its messages, and what it forgets."""

import pytest

from unicluster.chat.context import fullness, refused_as_full, turns_to_drop


@pytest.mark.parametrize(
    ("used", "context", "said"),
    [
        (3071, 4096, ""),
        (3072, 4096, "the context is 75 % full, 3072 of 4096 tokens"),
        (4096, 4096, "the context is 100 % full, 4096 of 4096 tokens"),
        (100, 0, ""),
    ],
)
def test_it_is_said_when_little_is_left(used: int, context: int, said: str) -> None:
    assert fullness(used, context) == said


def test_a_refusal_for_want_of_room_is_recognized() -> None:
    full = "messages: the prompt has 5000 tokens and the context is 4096"
    assert refused_as_full(full) == (5000, 4096)
    vast = "messages: the prompt has 900 bytes and the context of 16 tokens holds at most 500"
    assert refused_as_full(vast) == (900, 500)
    assert refused_as_full("messages: the prompt is empty") is None


def test_so_many_turns_are_dropped_that_half_of_the_context_is_free() -> None:
    assert turns_to_drop([100] * 10, 0, 4000, 4000) == 5
    assert turns_to_drop([500, 100, 100], 0, 4000, 4000) == 1
    assert turns_to_drop([100] * 10, 0, 1000, 4000) == 0
    assert turns_to_drop([10, 10], 10_000, 5000, 4000) == 2  # the question itself is too long
    assert turns_to_drop([], 10, 5000, 4000) == 0
