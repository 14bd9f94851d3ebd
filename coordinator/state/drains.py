"""Machines that are drained, in the state file: a reboot of everything leaves them so."""

import logging
import time

from coordinator.state.database import Database
from unicluster.errors import UniclusterError

log = logging.getLogger(__name__)


class Drains:
    """The drained machines of a state file, each by the id that follows from its key.

    So one that gets another name stays drained, and one that gets the name of another, or was
    installed anew, is not. A machine without an id ("": it is older) is known by its name.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._unkept: set[str] = set()  # keys of machines; said once, until all work again

    def names(self) -> set[str]:
        """Names that the drained machines had last."""
        return {row["name"] for row in self._database.rows("SELECT name FROM drained")}

    def note(self, name: str, machine: str = "", *, drained: bool) -> None:
        """Notes that the machine of that id is drained, or is not any more."""
        known = [_key(name, machine), _key(name, "")]
        if drained:
            self._forget(known[1:] if machine else [])
            self._database.write(
                "INSERT INTO drained (machine, name, since_s) VALUES (?, ?, ?) "
                "ON CONFLICT (machine) DO UPDATE SET name = excluded.name",
                (known[0], name, time.time()),
            )
        else:
            self._forget(known)

    def follow(self, name: str, machine: str = "", *, drained: bool, ordered: bool | None) -> bool:
        """Notes how a machine says that it is; returns whether it is to be drained again.

        ordered: whether its agent was drained, or that taken back, since it started; None: it does
        not say. A state file that can't be used drains nothing.
        """
        try:
            rows = self._database.rows(
                "SELECT machine, name FROM drained WHERE machine IN (?, ?)",
                (_key(name, machine), _key(name, "")),
            )
            again = bool(rows) and not drained and ordered is False
            current = [(_key(name, machine), name)] if drained or again else []
            if current != [(row["machine"], row["name"]) for row in rows]:
                self.note(name, machine, drained=bool(current))
        except UniclusterError as error:
            level = logging.DEBUG if self._unkept else logging.WARNING
            log.log(level, "which machines are drained is not kept: %s", error)
            self._unkept.add(_key(name, machine))
            return False
        if self._unkept:
            self._unkept.discard(_key(name, machine))
            if not self._unkept:
                log.info("which machines are drained is kept again")
        return again

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            self._database.write("DELETE FROM drained WHERE machine = ?", (key,))


def _key(name: str, machine: str) -> str:
    return machine or f"name {name}"
