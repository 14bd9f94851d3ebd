"""Answers of the gateway for one HTTP request: several at a time, and none that nobody reads."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from coordinator.api.doorman import Meter
from coordinator.protocols.errors import renamed
from coordinator.serving.gateway import Gateway
from unicluster.errors import UnavailableError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest

# Events that may wait for a client that reads slowly; then the head waits, too.
WAITING = 64

_Item = tuple[int, GenerateEvent] | Exception


class Answers:
    """Events of all answers to one request, in the order in which they come.

    names: of fields in the client's protocol, for errors.
    """

    def __init__(self, count: int, meter: Meter, names: Mapping[str, str]) -> None:
        self._open = count
        self._meter = meter
        self._names = names
        self._items: asyncio.Queue[_Item] = asyncio.Queue(WAITING)

    async def next(self, timeout: float | None = None) -> tuple[int, GenerateEvent] | None:
        """The next event and its answer's index; None after the last Finish.

        Raises TimeoutError after `timeout` seconds without one, and what broke an answer.
        """
        if not self._open:
            return None
        if self._items.empty():
            async with asyncio.timeout(timeout):
                item = await self._items.get()
        else:
            item = self._items.get_nowait()
        if isinstance(item, Exception):
            raise item
        self._open -= item[1].HasField("finish")
        return item

    async def fetch(
        self, gateway: Gateway, index: int, request: GenerateRequest, caller: str
    ) -> None:
        """Puts the events of one answer in the queue, or the error that ends it."""
        try:
            async with contextlib.aclosing(gateway.answer(request, caller)) as events:
                async for event in events:
                    self._meter.count(index, event)
                    await self._items.put((index, event))
                    if event.HasField("finish"):
                        return
            raise UnavailableError("the answer ended without saying why")
        except Exception as error:
            await self._items.put(renamed(error, self._names))


@contextlib.asynccontextmanager
async def answering(
    gateway: Gateway,
    requests: Sequence[GenerateRequest],
    caller: str,
    meter: Meter,
    names: Mapping[str, str],
) -> AsyncIterator[Answers]:
    """Answers to all `requests` at once while the block runs; what is left of them ends with it.

    names: as of Answers.
    """
    answers = Answers(len(requests), meter, names)
    tasks = [
        asyncio.create_task(answers.fetch(gateway, index, request, caller))
        for index, request in enumerate(requests)
    ]
    try:
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
