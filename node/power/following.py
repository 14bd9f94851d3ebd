"""Sleep of this machine, known before it begins, and put off while there is a stage."""

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

# For coordinators to hear of it. logind waits 5 s by default, a Mac 30 s.
HEAR_SECONDS = 3.0

Told = Callable[[bool], None]
KeepsAwake = Callable[[], bool]


@contextlib.asynccontextmanager
async def followed(
    sleeps: Callable[[bool], Coroutine[Any, Any, None]], keeps_awake: KeepsAwake
) -> AsyncIterator[None]:
    """While the block runs, `sleeps(True)` is awaited before the machine sleeps, for HEAR_SECONDS
    at most, and `sleeps(False)` when it is awake again.

    keeps_awake: whether the machine is not to fall asleep just because nobody types; a person who
    has it sleep, or a lid that is closed, is obeyed. It is called in a thread.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def tell(asleep: bool) -> None:
        telling = asyncio.run_coroutine_threadsafe(sleeps(asleep), loop)
        try:
            telling.result(HEAR_SECONDS)
        except TimeoutError:
            telling.cancel()
            log.warning("not every coordinator has heard that this machine goes to sleep")

    thread = threading.Thread(
        target=_follow, args=(tell, keeps_awake, stop), name="sleep", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()


def _follow(tell: Told, keeps_awake: KeepsAwake, stop: threading.Event) -> None:
    """Blocks until `stop`, or returns where this system announces no sleep."""
    # Each of them needs what only its system has.
    if sys.platform == "darwin":
        from node.power.iokit import follow
    elif sys.platform == "linux":
        from node.power.logind import follow
    else:
        return
    try:
        follow(tell, keeps_awake, stop)
    except Exception:  # the agent goes on without it
        log.exception("sleep of this machine is not followed any more")
