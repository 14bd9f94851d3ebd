"""Machines that are drained, in the state file: a reboot of everything leaves them so."""

import logging
import time

from coordinator.state.database import Database
from unicluster.errors import UniclusterError

log = logging.getLogger(__name__)


class Drains:
    """The drained machines of a state file, by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def names(self) -> set[str]:
        return {row["machine"] for row in self._database.rows("SELECT machine FROM drains")}

    def note(self, machine: str, *, drained: bool) -> None:
        """Notes that a machine is drained, or is not any more."""
        if drained:
            self._database.write(
                "INSERT OR IGNORE INTO drains (machine, since_s) VALUES (?, ?)",
                (machine, time.time()),
            )
        else:
            self._database.write("DELETE FROM drains WHERE machine = ?", (machine,))

    def follow(self, machine: str, *, drained: bool, ordered: bool | None) -> bool:
        """Notes how a machine says that it is; returns whether it is to be drained again.

        ordered: whether its agent was drained, or that taken back, since it started; None: it does
        not say. A state file that can't be used drains nothing.
        """
        try:
            known = machine in self.names()
            if known and not drained and ordered is False:
                return True
            if known != drained:
                self.note(machine, drained=drained)
        except UniclusterError as error:
            log.warning("which machines are drained is not kept: %s", error)
        return False
