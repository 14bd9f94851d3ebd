"""Events of services in the state file: the newest, up to a number of them."""

import time
from dataclasses import dataclass

from coordinator.state.database import Database

# Some megabytes.
MOST_EVENTS = 10_000


@dataclass(frozen=True)
class Logged:
    """An event. at_s: seconds since 1970 UTC. machine, cause: empty where they say nothing."""

    at_s: float
    service: str
    kind: str
    machine: str = ""
    cause: str = ""
    text: str = ""


class EventLog:
    """The events of a state file, which several processes may write."""

    def __init__(self, database: Database, most: int = MOST_EVENTS) -> None:
        self._database = database
        self._most = most

    def add(
        self, service: str, kind: str, *, machine: str = "", cause: str = "", text: str = ""
    ) -> None:
        """Adds an event that happens now, and forgets the oldest where there are too many."""
        self._database.write(
            "INSERT INTO events (at_s, service, kind, machine, cause, text) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (time.time(), service, kind, machine, cause, text),
        )
        self._database.write(
            "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (self._most,)
        )

    def newest(self, count: int) -> list[Logged]:
        """The newest events, at most so many, the oldest of them first."""
        rows = self._database.rows(
            "SELECT at_s, service, kind, machine, cause, text FROM events ORDER BY id DESC LIMIT ?",
            (count,),
        )
        return [Logged(*row) for row in reversed(rows)]
