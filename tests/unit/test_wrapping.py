"""Answers broken between words, however they are cut into pieces."""

import random
import textwrap

import pytest
from rich.cells import cell_len

from unicluster.chat.wrapping import WordWrap

TEXT = "The quick brown fox jumps over the lazy dog, and then once more over all of them. " * 4


def shown(text: str, width: int, dice: random.Random | None = None) -> str:
    """Text on a terminal of that width, which comes in pieces."""
    wrap = WordWrap(lambda: width)
    pieces, at = [], 0
    while at < len(text):
        size = dice.randint(1, 9) if dice is not None else len(text)
        pieces.append(wrap.feed(text[at : at + size]))
        at += size
    return "".join(pieces) + wrap.flush()


@pytest.mark.parametrize("width", [20, 33, 80])
@pytest.mark.parametrize("seed", range(5))
def test_lines_break_between_words(width: int, seed: int) -> None:
    lines = shown(TEXT, width, random.Random(seed)).splitlines()

    assert [line.rstrip() for line in lines] == textwrap.wrap(TEXT, width)


def test_nothing_is_lost_or_added_but_breaks() -> None:
    text = "One  two\n\n  - three\tfour\n" + "x" * 70 + " five\n" + TEXT
    for seed in range(20):
        assert shown(text, 30, random.Random(seed)).split() == text.split()
    assert shown(text, 10_000) == text


def test_lines_of_code_are_left_as_they_are() -> None:
    code = "```python\n" + "a = b + c " * 12 + "\n```\n"
    for seed in range(5):
        out = shown(f"{TEXT}\n{code}{TEXT}", 40, random.Random(seed))
        assert f"\n{code}The quick" in out
        assert out.count("\n") > TEXT.count(" ") // 10


def test_scripts_without_spaces_break_anywhere_within_the_width() -> None:
    out = shown("日本語の文章には空白がありません。" * 5, 21)

    assert max(map(cell_len, out.splitlines())) <= 21
    assert out.replace("\n", "") == "日本語の文章には空白がありません。" * 5


def test_a_word_in_the_middle_of_a_line_is_shown_as_it_comes() -> None:
    wrap = WordWrap(lambda: 80)
    assert wrap.feed("Once upon a ti") == "Once upon a ti"
    assert wrap.feed("me") == "me"
    assert wrap.feed(" " + "there lived " * 5) == " " + ("there lived " * 5).rstrip()[:-5] + "lived"


@pytest.mark.parametrize("width", [0, 10])
def test_a_terminal_of_no_known_width_breaks_lines_itself(width: int) -> None:
    assert shown(TEXT, width, random.Random(1)) == TEXT
