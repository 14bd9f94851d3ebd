"""Turns at work that takes long: a small piece before a large one, and none waits for ever."""

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import AsyncIterator

# By so many seconds for a byte a piece of work stands behind another: a prompt of 10 MB behind
# those of 100 kB that come within the 20 s after it.
SECONDS_PER_BYTE = 2e-6


class Turns:
    """Lets `most` pieces of work run at once, for one event loop.

    Of those that wait the next is the one with the earliest arrival, plus a time in proportion to
    its size.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """The block runs when its turn has come. size: in bytes."""
        if self._free:
            self._free -= 1
        else:
            due = time.monotonic() + size * SECONDS_PER_BYTE
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (due, next(self._numbers), future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1
