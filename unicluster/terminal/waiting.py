"""A line that says what a command waits for."""

import contextlib
from collections.abc import Iterator

from unicluster.terminal.console import Console


@contextlib.contextmanager
def doing(text: str) -> Iterator[None]:
    """Shows `text` on standard error while the block runs, if a person looks at it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
