"""Saving of cached prefixes while no answer runs, so that little is lost without power."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from node.pipeline.disk_prefixes import DiskPrefixes
from node.prefixes.index import MIN_TOKENS, covers
from node.prefixes.saved import Array
from node.prefixes.workload import Workload
from node.ring.compute_thread import pause

# Without any answer, until the first prefix is saved: a next turn may come at once.
IDLE_SECONDS = 2.0
# Between two questions whether all machines have written it.
FIRST_LOOK_SECONDS = 0.05
LAST_LOOK_SECONDS = 1.0


class Prefix(Protocol):
    """A cache of `tokens`; trimmable: any prefix of it can be used."""

    tokens: Array
    cache: list[Any]
    trimmable: bool


class IdleSaving:
    """Saves prefixes one by one, those used last first; stops when an answer begins.

    On the compute thread. `prefixes`: all in memory, those used last at the end. `start` runs a
    fiber. `workload`: the head's.
    """

    def __init__(
        self,
        disk: DiskPrefixes,
        workload: Workload,
        prefixes: Iterable[Prefix],
        start: Callable[[Callable[[], None]], None],
    ) -> None:
        self._disk = disk
        self._workload = workload
        self._prefixes = prefixes
        self._start = start
        self._working = False
        self._pause = 0  # counts pauses between answers

    def working(self) -> None:
        """An answer has begun."""
        if not self._working:
            self._working = True
            self._pause += 1
            self._workload.begin()

    def resting(self) -> None:
        """No answer runs any more."""
        if self._working:
            self._working = False
            self._workload.end()
            self._start(self._save)

    def close(self) -> None:
        """Ends all saving."""
        self._pause += 1
        if self._working:
            self._working = False
            self._workload.end()

    def _save(self) -> None:
        now = self._pause
        pause(IDLE_SECONDS)
        while now == self._pause:
            unsaved = self._unsaved()
            if not unsaved:
                return
            last = unsaved[-1]
            self._disk.save(last.tokens, last.cache, trimmable=last.trimmable, idle=True)
            seconds = FIRST_LOOK_SECONDS
            while now == self._pause and not self._disk.settled():
                pause(seconds)
                seconds = min(2 * seconds, LAST_LOOK_SECONDS)

    def _unsaved(self) -> list[Prefix]:
        """Prefixes that are not on disk, but for those of no use beside a longer one.

        To save the longer one makes them useless on disk, too: they would be saved after each.
        """
        prefixes = list(self._prefixes)
        return [
            prefix
            for prefix in prefixes
            if len(prefix.tokens) >= MIN_TOKENS
            and not self._disk.has(prefix.tokens)
            and not any(_longer(other, prefix) for other in prefixes)
        ]


def _longer(one: Prefix, other: Prefix) -> bool:
    """Whether a cache is of use wherever another is, and has more tokens."""
    more = len(one.tokens) > len(other.tokens)
    return more and covers(one.tokens, other.tokens, trimmable=one.trimmable)
