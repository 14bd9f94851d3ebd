"""The log where nobody reads standard error, and messages in narrow terminals."""

import io
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.deadlines import scaled
from unicluster.terminal.logs import MOST_WAITING, StderrLog
from unicluster.terminal.output import Output, wrapped

# More than a pipe takes together with all that may wait.
LINE = "x" * 400


@pytest.fixture
def pipe() -> Iterator[tuple[int, logging.Logger, StderrLog]]:
    """A pipe that is read by nobody yet, and a log that goes there."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    handler = StderrLog(Output(stream))
    logger = logging.Logger("tested")
    logger.addHandler(handler)
    yield reading, logger, handler
    threading.Thread(target=_read_all, args=(reading,), daemon=True).start()
    handler.drain(scaled(10))
    stream.close()


def _read_all(descriptor: int) -> None:
    with os.fdopen(descriptor, "rb") as file:
        while file.read(65536):
            pass


def test_what_nobody_reads_stops_nobody(pipe: tuple[int, logging.Logger, StderrLog]) -> None:
    reading, logger, handler = pipe
    count = 3 * MOST_WAITING
    logging_thread = threading.Thread(
        target=lambda: [logger.warning("%d %s", n, LINE) for n in range(count)], daemon=True
    )
    logging_thread.start()
    logging_thread.join(scaled(30))
    assert not logging_thread.is_alive()
    handler.drain(0.01)  # nor does its end

    lines = io.BytesIO()
    while b"messages are lost" not in lines.getvalue():
        lines.write(os.read(reading, 65536))
    shown = lines.getvalue().decode()
    assert "WARNING 0 x" in shown
    lost = int(shown.partition("more messages")[0].rpartition("(")[2])
    assert 0 < lost < count


def test_records_are_written_in_order_with_their_tracebacks(
    pipe: tuple[int, logging.Logger, StderrLog],
) -> None:
    reading, logger, handler = pipe
    logger.warning("one")
    try:
        raise KeyError("missing")
    except KeyError:
        logger.exception("two")
    handler.drain(scaled(10))

    shown = os.read(reading, 65536).decode()
    assert shown.index("WARNING one") < shown.index("ERROR two") < shown.index("KeyError")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_messages_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "unicluster: " + "deepseek-r1 needs 378.6 GB and the machine offers 120.0 GB " * 4

    def size(columns: int) -> None:
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))

    for columns in (40, 80):
        size(columns)
        shown = wrapped(line, Terminal())
        assert max(map(len, shown.splitlines())) <= columns
        assert shown.split() == line.split()
    size(0)  # nobody has said how wide it is
    assert wrapped(line, Terminal()) == line
    assert wrapped(line, io.StringIO()) == line
