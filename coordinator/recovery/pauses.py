"""Pauses between attempts to serve again: short while answers wait, over when machines change."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

# The longest pause while an answer waits: a machine that was away for a moment, or memory that has
# become free, shows to nobody who does not ask.
WAITED_SECONDS = 2.0


class Pauses:
    """Pauses of one service.

    was_cut: whether the last one ended because machines changed: failures before it then say
    nothing of the attempt behind it.
    """

    def __init__(self, changed: Callable[[float], Awaitable[bool]]) -> None:
        """changed: returns within so many seconds, at once when machines change: whether so."""
        self._changed = changed
        self._waiting = 0
        self._came = asyncio.Event()
        self.was_cut = False

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """While the block runs, an answer waits for the model."""
        self._waiting += 1
        self._came.set()
        try:
            yield
        finally:
            self._waiting -= 1

    async def pause(self, seconds: float) -> None:
        """Pauses for that long at most, or for WAITED_SECONDS while an answer waits."""
        clock = asyncio.get_running_loop().time
        began, self.was_cut = clock(), False
        changed = asyncio.ensure_future(self._changed(seconds))
        came: asyncio.Task[bool] | None = None
        try:
            while True:
                self._came.clear()
                most = min(seconds, WAITED_SECONDS) if self._waiting else seconds
                left = began + most - clock()
                if left <= 0 and not changed.done():
                    return
                came = asyncio.create_task(self._came.wait())
                await asyncio.wait(
                    [changed, came], timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
                )
                came.cancel()
                if changed.done():
                    self.was_cut = changed.result()
                    return
        finally:
            tasks = [task for task in (changed, came) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
