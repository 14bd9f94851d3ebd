"""How many threads each step of a stage on the CPU is computed with."""

import contextlib
import logging
import time
from collections.abc import Iterator

from node.metering.cores import RECENT_S, Cores, shared_cores
from node.metering.fastest import Fastest, doublings

log = logging.getLogger("unicluster.llama")

# Tokens of a step of decoding, at most, whose number of threads is tried out.
DECODED = 16


class Threads:
    """Numbers of threads, `most` at most: tried out in decoding, all in prefill.

    Stages of this machine that compute at the same time share the cores evenly.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._fastest = Fastest(doublings(most), most)
        self._cores: Cores | None = shared_cores()
        self.latest = most
        """Threads of the last step of decoding."""

    @property
    def settled(self) -> bool:
        """Whether the fastest number is known, as far as it was tried out."""
        return self._fastest.settled

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[int]:
        """Yields the number of threads of a step, which is timed."""
        decodes = tokens <= DECODED
        others = 0
        if self._cores is not None:
            # A prompt's next chunk comes at once, to the other stage as well.
            others = self._cores.others(0.0 if decodes else RECENT_S)
        wanted = self._fastest.setting if decodes else self._most
        threads = min(wanted, max(self._most // (1 + others), 1))
        with self._cores.computing() if self._cores is not None else contextlib.nullcontext():
            began = time.perf_counter()
            yield threads
            took = time.perf_counter() - began
        if not decodes:
            return
        self.latest = threads
        if threads == wanted and not others:
            self._note(tokens, took)

    def _note(self, tokens: int, seconds: float) -> None:
        before = self._fastest.best
        self._fastest.note(tokens, seconds)
        if self._fastest.best != before:
            log.info("%d threads decode faster than %d here", self._fastest.best, before)
