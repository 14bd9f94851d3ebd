"""Seconds in which nothing moved, as whoever looks for stuck work counts them."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from unicluster.deadlines import Work, floor_seconds

T = TypeVar("T")

# Between two looks for stuck work.
LOOK_SECONDS = 1.0
LOOKS_A_FLOOR = 20


def look_seconds() -> float:
    """Seconds between two looks for stuck work."""
    return min(LOOK_SECONDS, floor_seconds() / LOOKS_A_FLOOR)


class Stall:
    """Seconds for which nothing has moved, as far as the one who looks has seen.

    Time in which the looking itself stood still does not count: the process was stopped, or the
    machine slept or is overloaded.
    """

    def __init__(self, look_s: float | None = None) -> None:
        """look_s: between two looks."""
        self._look_s = look_s or look_seconds()
        self._mark: object = None
        self._looked = time.monotonic()
        self.seconds = 0.0

    def look(self, mark: object) -> float:
        """The seconds since `mark` was another one; 0 if it is new, or None: nothing runs."""
        now = time.monotonic()
        if mark is None or mark != self._mark:
            self._mark, self.seconds = mark, 0.0
        else:
            self.seconds += min(now - self._looked, 2 * self._look_s)
        self._looked = now
        return self.seconds


def stuck_reason(who: str, seconds: float, work: Work | str) -> str:
    """The message of the error for stuck work; `who` names the machine and its layers."""
    return f"{who} has computed nothing for {seconds:.0f} s: {work}"


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises TimeoutError after so many seconds of a Stall.

    Unlike asyncio.timeout it is not too late when this process itself was stopped in between.
    """
    working = asyncio.ensure_future(work)
    stall, look_s = Stall(min(look_seconds(), seconds / 4)), min(look_seconds(), seconds / 4)
    try:
        while not working.done():
            if stall.look(working) > seconds:
                raise TimeoutError
            await asyncio.wait([working], timeout=look_s)
        return working.result()
    finally:
        working.cancel()
