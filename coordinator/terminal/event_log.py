"""The events of a service on their way to the state file."""

from coordinator.serving.events import (
    Event,
    Leaving,
    Listening,
    Moving,
    Recovered,
    Recovering,
    Retrying,
    StageAdopted,
    StageFailed,
    Staying,
    Unloading,
    WasAsleep,
    WorkerEnded,
)
from coordinator.state.database import Database
from coordinator.state.event_log import EventLog
from coordinator.terminal.printer import leaving_line, moving_line, recovered_line
from unicluster.causes import Cause


class EventLogger:
    """Follows the events of one service; opens the state file in the thread that follows."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._database: Database | None = None
        self._log: EventLog | None = None

    def handle(self, event: Event) -> None:
        """Logs an event that is worth it. Raises InputError where the state file can't be used."""
        match event:
            case Listening():
                self._add("ready", text=f"at {event.address}")
            case StageAdopted():
                self._add("adopted", machine=event.machine)
            case WorkerEnded():
                self._add("worker ended", event.machine, event.cause, event.reason)
            case StageFailed():
                self._add("stage lost", event.machine, event.cause, event.reason)
            case WasAsleep():
                text = f"for {event.seconds:.0f} s"
                self._add("was asleep", event.machine, Cause.ASLEEP, text)
            case Recovering():
                self._add("recovering", text=event.reason)
            case Recovered():
                self._add("recovered", text=recovered_line(event).plain)
            case Retrying():
                self._add("waiting", text=event.reason)
            case Moving():
                self._add("moving", text=moving_line(event).plain)
            case Staying():
                self._add("staying", text=event.reason)
            case Leaving():
                self._add("left", text=leaving_line(event))
            case Unloading():
                self._add("unloaded")

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def _add(self, kind: str, machine: str = "", cause: str = "", text: str = "") -> None:
        if self._log is None:
            self._database = Database()
            self._log = EventLog(self._database)
        self._log.add(self._service, kind, machine=machine, cause=cause, text=text)
