"""Output of `--watch`: one table in place on a screen, one after another in a pipe or a file."""

import contextlib
import io
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.live import Live


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Yields a function that shows the newest state; in a pipe, only if it differs from the last.

    Raises BrokenPipeError when the reader of a pipe has gone.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda state: live.update(state, refresh=True)
        return
    last = ""

    def show(state: RenderableType) -> None:
        nonlocal last
        text = _rendered(state, console)
        if text != last:
            console.file.write(f"{text}\n")
            console.file.flush()
        last = text

    yield show


def _rendered(state: RenderableType, console: Console) -> str:
    text = io.StringIO()
    Console(file=text, width=console.width, legacy_windows=False, _environ={}).print(state)
    return text.getvalue()
