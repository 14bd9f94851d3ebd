"""Failpoints that chaos arms in processes that run: where, and how often each place is reached."""

import random
from pathlib import Path

from unicluster.failpoints import VARIABLE

# Reached with each frame, so that a worker gets somewhere first.
OFTEN = (
    "stage.received",
    "stage.compute",
    "cache.applied",
    "stage.computed",
    "stage.send",
    "stage.sent",
    "stage.return",
    "stage.returned",
    "head.compute",
    "head.send",
    "head.sent",
    "head.returned",
)
# Reached while a model is loaded, or taken over.
LOADING = (
    "worker.fetch",
    "worker.load",
    "worker.loaded",
    "stage.open",
    "fetch.block",
    "fetch.fetched",
    "agent.adopted",
)
# Reached by `serve`.
SERVING = ("serve.plan", "serve.planned", "serve.adopted", "state.write", "state.written")
# Not armed: prefixes on disk are lost by design where they can't be written or read.
PREFIXES = ("prefixes.read", "prefixes.write")
STEPS = (1, 300)
DELAY_MS = (50, 1500)


class Points:
    """A file of failpoints for each agent, and one for `serve`."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        folder.mkdir()
        self._folder = folder
        self._dice = dice

    def variables(self, name: str) -> dict[str, str]:
        """Environment of a process that can be armed, and of those that it starts."""
        return {VARIABLE: f"@{self._folder / name}"}

    def arm(self, name: str, point: str) -> None:
        """Has a process end, or wait for a moment, when it next reaches that place, or later."""
        nth = self._dice.randint(*STEPS) if point in OFTEN else 1
        action = self._dice.choice(["panic", f"delay({self._dice.randint(*DELAY_MS)})"])
        fresh = self._folder / f".{name}"
        fresh.write_text(f"{point}={action}@{nth}")
        fresh.replace(self._folder / name)

    def disarm(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
