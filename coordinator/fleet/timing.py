"""Times of a served model's tokens: answers are timed, and the times stored for plans."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from statistics import median

from coordinator.fleet.measured import Measurements, token_times
from coordinator.planning.placement import Stage
from unicluster.cluster.background import going_on
from unicluster.v1.chat_pb2 import Finish, Measured

# Shorter answers measure the time of a token too roughly.
TOKENS = 16
# Answers of which the median counts.
RECENT = 9


class Timing:
    """Times the answers of one deployment. Only those that had the machines to themselves count."""

    def __init__(self, model: str, stages: Sequence[Stage]) -> None:
        self._model = model
        self._stages = stages
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._news = asyncio.Event()
        self._running = self._begun = 0

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[Finish], None]]:
        """Times an answer while the block runs; the yielded function takes its Finish."""
        self._begun += 1
        number, alone = self._begun, not self._running

        def finished(finish: Finish) -> None:
            speed = finish.timings.tokens_per_s
            long_enough = finish.usage.completion_tokens >= TOKENS and speed > 0
            if alone and self._begun == number and long_enough:
                self._seconds.append(1 / speed)
                self._news.set()

        self._running += 1
        try:
            yield finished
        finally:
            self._running -= 1

    async def keep(self, measure: Callable[[], Awaitable[Measured]]) -> None:
        """Stores new measurements as they come, until cancelled.

        `measure` asks the head for the times of its stages and hops.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            with going_on("storing measurements"):
                meters = (await measure()).meters
                known = token_times(
                    self._stages,
                    [stage.decode_s for stage in meters.stages],
                    [hop.decode_s for hop in meters.hops],
                    median(self._seconds),
                )
                await asyncio.to_thread(Measurements.record, self._model, self._stages, known)

    @property
    def seconds_per_token(self) -> float | None:
        """The median of recent answers that count; None before the first."""
        return median(self._seconds) if self._seconds else None
