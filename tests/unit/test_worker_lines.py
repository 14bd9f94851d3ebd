"""Lines of a worker's streams: pieces, tails, and text that is safe to print."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.worker.channel import Channel
from node.worker.lines import LineReader, Tail
from unicluster.errors import printable

LIMIT = 8


@given(st.lists(st.binary(max_size=20)))
def test_no_byte_is_lost_and_no_piece_is_too_long(chunks: list[bytes]) -> None:
    pieces: list[bytes] = []
    reader = LineReader(LIMIT, pieces.append, pieces.append)
    for chunk in chunks:
        reader.data_received(chunk)
    reader.connection_lost(None)

    whole = b"".join(chunks)
    assert b"".join(pieces) == whole.replace(b"\n", b"")
    assert all(len(piece) <= LIMIT for piece in pieces)
    if all(len(line) <= LIMIT for line in whole.split(b"\n")):
        assert pieces == whole.split(b"\n")[: len(pieces)]


def test_what_stands_after_the_last_line_end_is_apart() -> None:
    lines: list[bytes] = []
    rests: list[bytes] = []
    reader = LineReader(LIMIT, lines.append, rests.append)

    reader.data_received(b"a\n\nb")
    assert not reader.closed.is_set()
    reader.connection_lost(None)

    assert (lines, rests) == ([b"a", b""], [b"b"])
    assert reader.closed.is_set()


def test_a_tail_is_bounded_in_lines_and_in_characters() -> None:
    tail = Tail(lines=3, chars=10)
    for line in ("a", "b", "c", "d"):
        tail.append(line)
    assert list(tail) == ["b", "c", "d"]

    tail.append("e" * 9)
    assert list(tail) == ["d", "e" * 9]

    tail.append("f" * 99)
    assert list(tail) == ["f" * 10]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 模型", "plain, größer, 模型"),
        ("a\tb", "a\tb"),
        ("\x1b[2J\r\x00", r"\x1b[2J\r\x00"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202e\ud800", r"\u202e\ud800"),
    ],
)
def test_nothing_steers_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_programs_that_a_worker_starts_do_not_get_its_channel() -> None:
    source, sink = os.pipe()
    os.set_inheritable(sink, True)

    channel = Channel(sink)

    assert not os.get_inheritable(sink)
    os.close(source)
    channel.send("tokens", more=1)  # nobody reads any more: nothing happens
    os.close(sink)
