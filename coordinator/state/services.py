"""Services that are wanted: which models, with which options, and how they were last carried out.

A row is there from a service's start until it is ended on purpose: one that is left stands for a
service whose coordinator was lost. Where its layers were outlives that end: machines have the files
and the prompt caches of their ranges on disk, so the next start prefers the same ones.
"""

import logging
import sqlite3
import time
from dataclasses import dataclass, replace

from coordinator.state.cut import Cut
from coordinator.state.database import Database
from unicluster.errors import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A service. options: JSON, equal for equal commands. since_s: seconds since 1970 UTC.

    inspected: the model's sizes, as whoever stored them wrote them; cut: where its layers were.
    None where it never got so far, or the row is damaged. last: where they were when it was served
    before, to its end or not.
    """

    name: str
    options: str
    since_s: float
    inspected: str | None = None
    cut: Cut | None = None
    last: Cut | None = None


class Services:
    """The services of a state file, several at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[Wanted]:
        """All that are wanted, by name."""
        rows = self._database.rows("SELECT * FROM services ORDER BY name")
        return [_wanted(row) for row in rows]

    def begin(self, name: str, options: str) -> Wanted:
        """Notes that a service is wanted; with what is known of it, if its options are the same."""
        rows = self._database.rows("SELECT * FROM services WHERE name = ?", (name,))
        last = self._last(name, options)
        if rows and rows[0]["options"] == options:
            return replace(_wanted(rows[0]), last=last)
        now_s = time.time()
        self._database.write(
            "INSERT OR REPLACE INTO services (name, options, since_s) VALUES (?, ?, ?)",
            (name, options, now_s),
        )
        return Wanted(name, options, now_s, last=last)

    def keep(self, name: str, inspected: str, cut: Cut) -> None:
        """Keeps how a service is carried out now."""
        self._database.write(
            "UPDATE services SET inspected = ?, cut = ? WHERE name = ?",
            (inspected, cut.to_json(), name),
        )
        self._database.write(
            "INSERT OR REPLACE INTO layouts (service, options, cut) "
            "SELECT name, options, cut FROM services WHERE name = ?",
            (name,),
        )

    def end(self, name: str) -> None:
        """The service is wanted no more."""
        self._database.write("DELETE FROM services WHERE name = ?", (name,))

    def _last(self, name: str, options: str) -> Cut | None:
        rows = self._database.rows(
            "SELECT cut FROM layouts WHERE service = ? AND options = ?", (name, options)
        )
        return _cut(name, rows[0]["cut"]) if rows else None


def _wanted(row: sqlite3.Row) -> Wanted:
    cut = _cut(row["name"], row["cut"])
    return Wanted(row["name"], row["options"], row["since_s"], row["inspected"], cut)


def _cut(name: str, text: str | None) -> Cut | None:
    """The cut in a row; None where there is none, or it is damaged, which is logged."""
    if text is None:
        return None
    try:
        return Cut.from_json(text)
    except ValueError as error:
        log.warning("state file: where %s was is unknown: %s", shown(name), error)
        return None
