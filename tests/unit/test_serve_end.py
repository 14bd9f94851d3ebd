"""The end of `serve` in good order: the service is cancelled once, and ends in its own time."""

import asyncio
from typing import Any

from coordinator.commands.serve import Running


async def test_whoever_stops_waiting_does_not_cancel_the_service() -> None:
    never = asyncio.Event()
    service: Any = None
    task = asyncio.create_task(never.wait())
    waiting = asyncio.create_task(Running(service, "", None, None, task).wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not task.done()
    assert not task.cancelling()
    task.cancel()
