"""Standard files as processes may get them: closed, full, or a narrow terminal."""

import io
import logging
import os
import sys
import textwrap
from typing import TextIO

log = logging.getLogger(__name__)


class Output(io.TextIOBase):
    """A text stream like `stream` that never raises: what can't be written is dropped.

    It writes past the buffer of `stream`. A write that nobody reads may block, and then holds
    no lock that the interpreter wants at its end. `stream` is None where the process was started
    with the descriptor closed.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream
        self._descriptor: int | None = None
        if stream is not None:
            self.encoding = stream.encoding
            try:
                self._descriptor = stream.fileno()
            except (OSError, ValueError):  # closed, or not one of the operating system's
                log.info("standard output can't be written: nothing is printed")

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        rest = memoryview(text.encode(self.encoding, "replace"))
        while rest and self._descriptor is not None:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                log.info("nothing more is printed: %s", error.strerror)
                self._descriptor = None
        return len(text)


def open_standard_files() -> None:
    """Opens those of the descriptors 0 to 2 that are closed on /dev/null.

    Else the next file or connection would get that number, and what is printed would go there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def wrapped(line: str, stream: TextIO) -> str:
    """A line broken between words for the terminal that `stream` is; unchanged elsewhere."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return line
    if not 20 <= width < len(line):
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
