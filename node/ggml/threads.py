"""How many threads each step of a stage on the CPU is computed with."""

import contextlib
import logging
import time
from collections.abc import Iterator

from node.metering.cores import Cores, shared_cores
from node.metering.fastest import Fastest, doublings

log = logging.getLogger("unicluster.llama")

# Tokens of a step of decoding, at most, whose number of threads is tried out.
DECODED = 16


class Threads:
    """Numbers of threads, `most` at most: tried out in decoding, all in prefill.

    In decoding, stages of this machine that compute at the same time share the cores evenly: each
    waits for its threads hundreds of times a token. A prompt's steps between such waits are long,
    and of the stages that compute it some have fewer layers and leave cores to the others.
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
        others = self._cores.computing_now() if self._cores is not None else []
        wanted = self._fastest.setting if decodes else self._most
        even = max(self._most // (1 + len(others)), 1)
        threads = min(wanted, even) if decodes else wanted
        with self._cores.computing(threads) if self._cores else contextlib.nullcontext():
            began = time.perf_counter()
            yield threads
            took = time.perf_counter() - began
        if decodes:
            self.latest = threads
        if decodes and threads == wanted and not others:
            self._note(tokens, took)

    def _note(self, tokens: int, seconds: float) -> None:
        before = self._fastest.best
        self._fastest.note(tokens, seconds)
        if self._fastest.best != before:
            log.info("%d threads decode faster than %d here", self._fastest.best, before)
