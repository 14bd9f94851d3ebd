"""Output of a running worker: events, log records, and printed lines."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from node.worker.events import is_known, parse_event
from node.worker.lines import LineReader, Tail
from unicluster.causes import Cause
from unicluster.errors import printable

log = logging.getLogger("unicluster.worker")

# A longer line of the channel is no event. Printed lines come in pieces that a log can show.
EVENT_BYTES = 16 * 2**20
PRINTED_BYTES = 8 * 2**10
TAIL_LINES = 20
TAIL_CHARS = 32 * 2**10
# Events not read yet. The oldest are dropped first: a worker never waits for a reader.
PENDING_EVENTS = 1000

_DOING = {"fetching": "fetching files", "progress": "loading", "ready": "serving its layers"}


class WorkerReport:
    """Two streams of a worker: `channel` with its events, `output` with printed lines.

    Log records come through the channel and appear in this process's log with their level and
    logger, behind the worker's name; printed lines appear there at level INFO.

    name: of the worker, in this process's log.
    failure: the reason that the worker gave for its end, or the fault of its channel; cause: its
    kind.
    broken: whether its channel has failed. heard: events so far, signs of life included.
    doing: what it does, by its last event.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._tail = Tail(TAIL_LINES, TAIL_CHARS)
        self.channel = LineReader(EVENT_BYTES, self._on_event, self._on_partial_event)
        self.output = LineReader(PRINTED_BYTES, self._on_printed, self._on_printed)
        self.last_printed = ""
        self.failure: str | None = None
        self.cause = ""
        self.broken = asyncio.Event()
        self.heard = 0
        self.doing = ""

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines that were logged or printed."""
        return tuple(self._tail)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events, but for log records, until `end` is called."""
        while (event := await self._events.get()) is not None:
            yield event
        self.end()  # for other readers

    def end(self) -> None:
        """Ends `events` after those already queued."""
        self._events.put_nowait(None)

    def break_off(self, reason: str, cause: Cause = Cause.FAILED) -> None:
        """Takes no more events; `reason` is why, unless the worker gave one."""
        if self.failure is None:
            self.failure, self.cause = reason, cause
        self.broken.set()

    def _on_event(self, line: bytes) -> None:
        if self.broken.is_set():
            return
        try:
            event = parse_event(line)
        except ValueError as error:
            beginning = printable(line[:40].decode(errors="replace"))
            self.break_off(f"broke its event channel: {error}: {beginning}")
            return
        self.heard += 1
        if event["event"] == "alive":
            return
        if not is_known(event):
            log.debug("[%s] ignored an event of kind %s", self.name, printable(event["event"]))
        elif event["event"] == "log":
            self._on_record(event["level"], event["logger"], event["message"])
        else:
            self._on_progress(event)

    def _on_progress(self, event: dict[str, Any]) -> None:
        if event["event"] == "failed":
            event["reason"] = self.failure = printable(event["reason"])
            cause = event.get("cause")
            self.cause = printable(cause) if isinstance(cause, str) else Cause.FAILED
        self.doing = _DOING.get(event["event"], self.doing)
        if self._events.qsize() >= PENDING_EVENTS:
            self._events.get_nowait()
        self._events.put_nowait(event)

    def _on_partial_event(self, line: bytes) -> None:
        log.debug("[%s] ended within an event of %d bytes or more", self.name, len(line))

    def _on_record(self, level: str, logger: str, message: str) -> None:
        lines = [printable(line) for line in message.splitlines()]
        for line in lines:
            self._tail.append(line)
        number = logging.getLevelNamesMapping().get(level, logging.INFO)
        logging.getLogger(logger).log(number, "[%s] %s", self.name, "\n".join(lines))

    def _on_printed(self, line: bytes) -> None:
        # Progress bars overwrite their line: its last state is what a terminal would show.
        shown = line.rstrip().rpartition(b"\r")[2]
        if text := printable(shown.decode(errors="replace")):
            self.last_printed = text
            self._tail.append(text)
            log.info("[%s] %s", self.name, text)
