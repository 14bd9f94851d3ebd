"""A submitted request, as its caller sees it."""

import asyncio
from collections.abc import Callable

from node.generation.request import Job
from node.tools.reader import CallReader
from unicluster.errors import UniclusterError
from unicluster.v1.chat_pb2 import GenerateEvent

# How an answer ended early: its client left.
CANCELLED = "cancelled"


class Ticket:
    """Iterate over its events, in the event loop that it was made in.

    The iteration ends after the Finish event, raises the error that ended the answer, or just
    ends when the ticket was cancelled. `asked` is when, by time.perf_counter.
    """

    def __init__(self, job: Job, asked: float, on_cancel: Callable[["Ticket"], None]) -> None:
        self.job = job
        self.asked = asked
        self.ended = False
        self.broken = ""  # how it ended early: cancelled or failed
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[GenerateEvent | UniclusterError | None] = asyncio.Queue()

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> GenerateEvent:
        item = await self._items.get()
        if isinstance(item, GenerateEvent):
            if self.job.calls is not None:
                await self._read_calls(self.job.calls, item)
            return item
        self._items.put_nowait(item)  # who looks again finds the same end
        if item is None:
            raise StopAsyncIteration
        raise item

    async def _read_calls(self, calls: CallReader, event: GenerateEvent) -> None:
        """On another thread where there is much to read: the event loop serves others too."""
        if event.delta.tool_call:
            await asyncio.to_thread(calls.read, event)
        else:
            calls.read(event)

    def cancel(self) -> None:
        """Ends the answer and frees its caches, at any moment and from any thread."""
        if not self.ended:
            self.broken = CANCELLED
            self.end()
            self._on_cancel(self)

    def send(self, events: list[GenerateEvent]) -> None:
        """Delivers events; from any thread."""
        self._put(*events)

    def end(self, error: UniclusterError | None = None) -> None:
        """Nothing comes after this; from any thread."""
        self.ended = True
        if error is not None:
            self.broken = "failed"
        self._put(error)

    def _put(self, *items: GenerateEvent | UniclusterError | None) -> None:
        def put() -> None:
            for item in items:
                self._items.put_nowait(item)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()
