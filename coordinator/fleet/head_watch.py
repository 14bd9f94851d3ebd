"""The watch over a head: whether it answers calls, and whether its answers get on."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc

from unicluster.cluster.background import going_on
from unicluster.deadlines import PREFILL, Work, WorkDeadlines, floor_seconds
from unicluster.stall import Stall, stuck_reason
from unicluster.v1.chat_pb2 import MeasureRequest

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub

# Between two questions, in times that any work may take.
ASK_FLOORS = 1 / 6
# Of silence: a head whose event loop stands still answers pings, and no calls.
SILENT_FLOORS = 2.0
# The head watches its own work, and that of its ring, and is given the time to find out first.
PATIENCE_FLOORS = 2.0


class HeadWatch:
    """Watches the head of one deployment.

    prefill_s: seconds a token of a prompt on all stages, as planned; a chunk has `chunk` tokens.
    """

    def __init__(self, prefill_s: float, chunk: int) -> None:
        deadlines = WorkDeadlines({PREFILL: prefill_s})
        self._limit = deadlines.limit(Work(PREFILL, max(chunk, 1)))
        self._limit += PATIENCE_FLOORS * floor_seconds()
        self._awaited = 0  # answers whose next event is waited for
        self._events = 0

    @contextlib.contextmanager
    def answer(self) -> Iterator[None]:
        """While the block runs, an event of an answer is waited for."""
        self._awaited += 1
        try:
            yield
        finally:
            self._awaited -= 1
            self._events += 1

    async def until_stuck(self, chat: "ChatAsyncStub", who: str) -> str:
        """Returns the reason once the head is stuck; `who` names it."""
        ask_s = ASK_FLOORS * floor_seconds()
        silent, still = Stall(ask_s), Stall(ask_s)
        heard, counters = 0, b""
        while True:
            await asyncio.sleep(ask_s)
            with going_on(f"asking {who}"):
                try:
                    meters = (await chat.Measure(MeasureRequest(), timeout=ask_s)).meters
                    meters.now_s = 0.0
                    heard, counters = heard + 1, meters.SerializeToString(deterministic=True)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                        heard += 1  # it is another trouble, which the ring's stream tells
            silent_s = silent.look(heard)
            still_s = still.look((self._events, counters) if self._awaited else None)
            if silent_s > SILENT_FLOORS * floor_seconds():
                return f"{who} has answered no call for {silent_s:.0f} s"
            if still_s > self._limit:
                return stuck_reason(who, still_s, f"{self._awaited} answers")
