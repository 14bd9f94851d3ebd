"""The screens of a newcomer are those in tests/unit/screens, which people have read."""

import re

import pytest
from rich.cells import cell_len

from tests.support.screens import ESCAPE, FOLDER, SCREENS, WAYS, path_of, screen

# Of no use to be broken: a command to be copied, a line of code, and examples.
WHOLE = re.compile(r"unicluster |^evening  ships")


@pytest.mark.parametrize("name", SCREENS)
def test_screens_are_those_reviewed(name: str) -> None:
    """After a change: `python -m tests.support.screens`, and read what differs."""
    for way in WAYS:
        assert screen(name, way) == path_of(name, way).read_text("utf-8"), f"{name} {way}"


def test_every_file_is_a_screen() -> None:
    known = {path_of(name, way) for name in SCREENS for way in WAYS}
    assert set(FOLDER.iterdir()) == known


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.parametrize("way", ["80", "120"])
def test_screens_are_no_wider_than_the_terminal(name: str, way: str) -> None:
    for line in path_of(name, way).read_text("utf-8").splitlines():
        assert cell_len(line) <= int(way) or WHOLE.search(line), line


@pytest.mark.parametrize("name", SCREENS)
def test_nothing_is_cut_and_pipes_get_plain_text(name: str) -> None:
    for way in WAYS:
        text = path_of(name, way).read_text("utf-8")
        assert "…" not in text, way
        if way != "no-color":
            assert ESCAPE not in text, way
        # Colours are 30 to 37, 90 to 97, and 38: bold and dim are none.
        assert not re.search(rf"{ESCAPE}\[[0-9;]*\b(3[0-8]|9[0-7])[;m]", text)


@pytest.mark.parametrize("way", ["80", "pipe"])
def test_machines_of_a_kind_are_told_apart(way: str) -> None:
    for name in ("plan", "nodes", "status", "serve"):
        text = path_of(name, way).read_text("utf-8")
        assert "mac-studio-m3-ultra-512-1" in text
        assert "mac-studio-m3-ultra-512-2" in text


def test_the_verdict_comes_first() -> None:
    for way in WAYS:
        first = path_of("plan", way).read_text("utf-8").partition("\n")[0]
        assert re.search(r"Fits: [\d.]+ tokens/s on 2 of 3 machines", first), way
