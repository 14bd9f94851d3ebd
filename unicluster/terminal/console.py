"""The console of commands that print tables."""

import rich.console


class Console(rich.console.Console):
    """A console that leaves a reader who has gone to `main`: rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls it where it handles the BrokenPipeError
