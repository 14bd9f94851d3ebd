"""A line that says what an answer waits for, and is overwritten."""

import os
import shutil
from typing import TextIO

from unicluster.chat.screen import Screen
from unicluster.client.answers import Status
from unicluster.errors import printable

_OVER = ("ready", "resumed")


class StatusLine:
    """Shown on `out` where that is a terminal, else not at all."""

    def __init__(self, out: TextIO, screen: Screen) -> None:
        """`screen`: where the answer goes; its line ends before one is shown."""
        self._out = out
        self._screen = screen
        self._works = out.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False

    def show(self, status: Status) -> None:
        """Takes the place of the line before; an answer that goes on takes it away."""
        self.clear()
        if not self._works or status.state in _OVER:
            return
        self._screen.break_line()
        columns = shutil.get_terminal_size().columns - 1
        line = printable(": ".join(filter(None, (f"waiting, {status.state}", status.detail))))
        self._out.write(line[:columns])
        self._out.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()
        self._shown = False
