"""Standard output and standard error for those who must not fail with them."""

import io
import logging
import os
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
