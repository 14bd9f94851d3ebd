"""Lines of a stream from another process: of any length, in bounded memory, safe to print."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator


class LineReader(asyncio.Protocol):
    """Calls `on_line` with each line of a stream, without its end.

    A line of more than `limit` bytes comes in pieces of `limit` bytes. `on_rest` gets the text
    after the last line end when the stream closes.
    """

    def __init__(
        self, limit: int, on_line: Callable[[bytes], None], on_rest: Callable[[bytes], None]
    ) -> None:
        self._limit = limit
        self._on_line = on_line
        self._on_rest = on_rest
        self._pending = bytearray()
        self.closed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._extend(end)
            self._on_line(self._take(len(self._pending)))
        self._extend(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._pending:
            self._on_rest(self._take(len(self._pending)))
        self.closed.set()

    def _extend(self, data: bytes) -> None:
        self._pending += data
        while len(self._pending) > self._limit:
            self._on_line(self._take(self._limit))

    def _take(self, size: int) -> bytes:
        piece = bytes(self._pending[:size])
        del self._pending[:size]
        return piece


class Tail:
    """The last lines of a stream: at most `lines` of them, and `chars` characters together."""

    def __init__(self, lines: int, chars: int) -> None:
        self._lines: deque[str] = deque()
        self._max_lines = lines
        self._max_chars = chars
        self._chars = 0

    def append(self, line: str) -> None:
        """Adds a line, cut to the number of characters that the tail may have."""
        line = line[: self._max_chars]
        self._lines.append(line)
        self._chars += len(line)
        while len(self._lines) > self._max_lines or self._chars > self._max_chars:
            self._chars -= len(self._lines.popleft())

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)
