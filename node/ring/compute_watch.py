"""The watch over the compute thread: ends a worker whose work is stuck, or has failed."""

import asyncio
import logging

from node.ring.compute_thread import MLXThread
from unicluster.errors import StageError, StuckError, in_one_line
from unicluster.stall import Stall, look_seconds, stuck_reason

log = logging.getLogger(__name__)


async def watch(thread: MLXThread, who: str) -> None:
    """Returns never; raises StageError naming `who` once the thread's work is stuck or failed."""
    stall = Stall()
    while True:
        if (failure := thread.failure) is not None:
            kind = type(failure).__name__
            reason = f"{who}: the compute thread failed: {kind}: {in_one_line(failure)}"
            raise StageError(reason) from failure
        lap = thread.running
        stuck_s = stall.look(lap)
        if lap is not None and stuck_s > thread.deadlines.limit(lap[1]):
            log.error("the compute thread is stuck at:\n%s", thread.stack())
            raise StuckError(stuck_reason(who, stuck_s, lap[1]))
        await asyncio.sleep(look_seconds())
