"""Failpoints that chaos arms in processes that run: where, and how often each place is reached."""

import random
from collections import defaultdict
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
# Reached when a worker is started again.
STARTING = ("worker.fetch", "worker.load", "worker.loaded", "stage.open")
# Reached by a worker whose machine has no copy of the model, or has lost it.
FETCHING = ("fetch.block", "fetch.fetched")
# Reached when stages of a lost coordinator are taken over: in agents, and in `serve`.
ADOPTED, ADOPTING = ("agent.adopted",), ("serve.adopted",)
# Reached by `serve` when a machine is lost, and with each event.
PLANNING = ("serve.plan", "serve.planned")
STATE = ("state.write", "state.written")
SERVING = (*PLANNING, *ADOPTING, *STATE)
# Of each of them the next place has its turn, of those of frames twice as often.
KINDS = (OFTEN, OFTEN, STARTING, FETCHING, ADOPTED, SERVING)

STEPS = (1, 15)
# Less than counts as stuck.
DELAY_MS = (50, 900)


class Points:
    """A file of failpoints for each agent, and one for `serve`."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        folder.mkdir()
        self._folder = folder
        self._dice = dice
        self._armed: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._turns: dict[tuple[str, ...], list[str]] = {}

    def variables(self, name: str) -> dict[str, str]:
        """Environment of a process that can be armed, and of those that it starts."""
        return {VARIABLE: f"@{self._folder / name}"}

    def turn(self, points: tuple[str, ...]) -> str:
        """The next of some places; each has its turn before one comes again."""
        left = self._turns.setdefault(points, [])
        if not left:
            left += self._dice.sample(points, len(points))
        return left.pop()

    def panic(self, name: str, point: str) -> None:
        """Has a process end when it next reaches that place, or some times later."""
        self._arm(name, point, "panic")

    def error(self, name: str, point: str) -> None:
        """Has it raise an error there."""
        self._arm(name, point, "error")

    def delay(self, name: str, point: str) -> None:
        """Has a process wait for a moment there."""
        self._arm(name, point, f"delay({self._dice.randint(*DELAY_MS)})")

    def disarm(self, name: str, point: str) -> None:
        self._armed[name].pop(point, None)
        self._write(name)

    def _arm(self, name: str, point: str, action: str) -> None:
        nth = self._dice.randint(*STEPS) if point in OFTEN else 1
        self._armed[name][point] = f"{point}={action}@{nth}"
        self._write(name)

    def _write(self, name: str) -> None:
        fresh = self._folder / f".{name}"
        fresh.write_text(";".join(self._armed[name].values()))
        fresh.replace(self._folder / name)
