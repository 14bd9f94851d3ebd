"""Output of a chat: answers in plain text, everything around them dimmed."""

import os
from typing import TextIO

from unicluster.chat.wrapping import WordWrap
from unicluster.terminal.output import wrapped

# A model must not be able to move the cursor or set the title of a person's terminal.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Screen:
    """Writes to a terminal, or to a file or pipe: there without escape codes, byte for byte."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._styled = (
            self._terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        )
        self._line_open = False
        self._thinking = False
        self._wrap = WordWrap(self._columns)

    def text(self, text: str) -> None:
        """A piece of the answer."""
        if self._thinking:
            self.end_line()
            self._write("\n")
            text = text.lstrip("\n")
        self._thinking = False
        self._flow(text)

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks or does on the way to its answer."""
        if not self._thinking:
            self.end_line()
        self._thinking = True
        self._flow(text, "2")

    def note(self, line: str) -> None:
        """A dimmed line that is no part of the answer."""
        self._line(line, "2")

    def error(self, line: str) -> None:
        self._line(f"error: {line}", "31")

    def end_line(self) -> None:
        """The next piece begins on a new line."""
        self._write(self._wrap.flush(), "2" if self._thinking else None)
        self._wrap = WordWrap(self._columns)
        self._thinking = False
        if self._line_open:
            self._write("\n")

    def break_line(self) -> None:
        """As `end_line`, on a terminal: other output is to come. A file gets nothing more."""
        if self._terminal:
            self.end_line()

    def _line(self, line: str, style: str) -> None:
        self.end_line()
        self._write(wrapped(line, self._out), style)
        self._write("\n")

    def _columns(self) -> int:
        """Columns of the terminal; 0 where they are not known, and for a file or pipe."""
        try:
            return os.get_terminal_size(self._out.fileno()).columns if self._terminal else 0
        except (OSError, ValueError):
            return 0

    def _flow(self, text: str, style: str | None = None) -> None:
        """Writes text whose lines break between words."""
        self._write(self._wrap.feed(text.translate(_CONTROL) if self._terminal else text), style)

    def _write(self, text: str, style: str | None = None) -> None:
        if self._terminal:
            text = text.translate(_CONTROL)
        if not text:
            return
        self._line_open = not text.endswith("\n")
        self._out.write(f"\x1b[{style}m{text}\x1b[0m" if style and self._styled else text)
        self._out.flush()
