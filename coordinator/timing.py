"""What a served model takes for a token: the answers that go by are timed, and kept for plans."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from coordinator.learned import Learned, Taken, shared_out
from coordinator.placement import Stage
from unicluster.v1.chat_pb2 import Finish

log = logging.getLogger(__name__)

# Of shorter answers the time a token takes is told too roughly.
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
        """A block for as long as an answer runs; what it gives is to be told of the end."""
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

    async def keep(self) -> None:
        """Stores what was learnt whenever there is news, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            taken = self._taken(median(self._seconds))
            try:
                await asyncio.to_thread(Learned.record, self._model, self._stages, taken)
            except OSError as error:
                log.warning("what was measured can't be kept: %s", error)

    @property
    def seconds_per_token(self) -> float | None:
        """The median of recent answers that count; None before the first."""
        return median(self._seconds) if self._seconds else None

    def _taken(self, seconds: float) -> Taken:
        """What that is by stage and hop, as far as it can be told from whole answers."""
        return shared_out(self._stages, seconds)
