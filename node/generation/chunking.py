"""Chunked prefill: the tokens of a prompt that are computed at a time."""

import math

from node.pipeline.pending_logits import FrameProgress
from node.pipeline.pipeline_model import PUSHED_TOKENS

# Maximum inter-token latency of running answers while a prompt is prefilled: in seconds, or in
# undisturbed decode steps, whichever is longer.
MAX_INTER_TOKEN_S = 0.25
MAX_INTER_TOKEN_STEPS = 4
# In smaller chunks the overhead of Python dominates.
MIN_TOKENS = 24
# Crossover of a chunk's cost, until it is measured: the tokens whose computing takes as long as
# the fixed cost of a chunk (weights read, kernels started). Few on a CPU, hundreds on a GPU.
CROSSOVER_TOKENS = 16.0
GPU_CROSSOVER_TOKENS = 256.0
MAX_CROSSOVER_TOKENS = 4096.0
# Factor by which one measurement, which may be far off, moves the crossover at most.
MAX_CHANGE = 16.0
# Chunks of one prompt that are measured at most: later ones also read the caches of earlier ones.
MEASURED_CHUNKS = 5


class FirstChunks:
    """Measured times of the first chunks of a prompt, from which the crossover is estimated."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, float, FrameProgress | None]] = []
        self._reported = 1

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def add(self, tokens: int, here_s: float, progress: FrameProgress | None) -> None:
        """Adds a chunk that took the head `here_s` seconds; `progress` of the other stages."""
        if len(self._chunks) < MEASURED_CHUNKS:
            self._chunks.append((tokens, here_s, progress))

    def report(self, sizer: "ChunkSizer") -> None:
        """Gives the sizer each chunk that has completed, compared with the first one."""
        while self._reported < len(self._chunks):
            (small, seconds), (large, large_seconds) = map(self._slowest, (0, self._reported))
            if seconds is None or large_seconds is None:
                return
            sizer.compare(small, seconds, large, large_seconds)
            self._reported += 1

    def _slowest(self, index: int) -> tuple[int, float | None]:
        tokens, here_s, progress = self._chunks[index]
        if progress is None:
            return tokens, here_s
        return tokens, None if progress.slowest_s is None else max(here_s, progress.slowest_s)


class ChunkSizer:
    """Sizes prefill chunks, of `most` tokens at most.

    Minimizes the time of a prompt through all `stages`, within the maximum inter-token latency of
    the answers that are decoding meanwhile.
    """

    def __init__(self, most: int, stages: int, crossover: float = CROSSOVER_TOKENS) -> None:
        self.most = most
        self._stages = stages
        self._crossover = crossover
        self._latency_limit = float(MIN_TOKENS)
        self._step = 0.0

    def chunk(self, prompt: int, decoding: bool, first: bool = False) -> int:
        """Tokens of the next chunk of a prompt of `prompt` tokens.

        P tokens in chunks of n pass S stages in P/n + S - 1 times the seconds of a chunk, which
        are proportional to n + crossover: minimal for n = sqrt(P * crossover / (S - 1)). The first
        chunk is half as large, to measure the crossover and to start the second stage sooner.
        `decoding`: whether answers are running.
        """
        size = float(self.most)
        if self._stages > 1:
            size = math.sqrt(prompt * self._crossover / (self._stages - 1))
        if decoding:
            size = min(size, self._latency_limit)
        size = min(max(round(size), MIN_TOKENS), self.most)
        if first and self._stages > 1 and not decoding:
            return min(max(size // 2, PUSHED_TOKENS + 1), size)
        return size

    def compare(self, small: int, seconds: float, large: int, large_seconds: float) -> None:
        """Updates the crossover by the seconds that two chunks took on the slowest machine."""
        if large <= small:
            return
        per_token = max((large_seconds - seconds) / (large - small), 0.0)
        fixed = max(seconds - small * per_token, 0.0)
        crossover = fixed / per_token if per_token else MAX_CROSSOVER_TOKENS
        crossover = min(max(crossover, self._crossover / MAX_CHANGE), self._crossover * MAX_CHANGE)
        self._crossover = min(
            max(math.sqrt(self._crossover * crossover), 1.0), MAX_CROSSOVER_TOKENS
        )

    def note(self, seconds: float, prefilling: bool) -> None:
        """Counts the seconds of a lane's step; `prefilling`: while a prompt was computed."""
        if not prefilling:
            self._step = seconds if not self._step else 0.9 * self._step + 0.1 * seconds
            return
        target = max(MAX_INTER_TOKEN_S, MAX_INTER_TOKEN_STEPS * self._step)
        change = min(max(target / seconds, 0.25), 1.25)
        self._latency_limit = min(max(self._latency_limit * change, MIN_TOKENS), self.most)
