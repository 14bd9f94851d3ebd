"""How much of a prompt is computed at a time."""

import math

from node.pipeline.pending_logits import Way
from node.pipeline.pipeline_model import PUSHED_TOKENS

# What a running answer may have to wait for its next token while a prompt is prefilled: seconds,
# or that many times what a token takes undisturbed, if that is more.
GAP = 0.25
GAP_STEPS = 4
# Smaller ones would be mostly Python.
LEAST_TOKENS = 24
# Until it is measured: the tokens whose computing takes as long as what a chunk takes anyway,
# whatever its size: reading the weights, starting kernels. Few on a CPU, hundreds on a GPU.
KNEE = 16.0
GPU_KNEE = 256.0
MOST_KNEE = 4096.0
# One measurement, which may be off by much, moves it by no more than this factor.
TRUST = 16.0
# So many of a prompt are looked at, for the same reason.
FIRST_CHUNKS = 5


class Beginning:
    """The first chunks of a prompt, which tell what a chunk costs.

    Later ones also read the caches of those before.
    """

    def __init__(self) -> None:
        self._chunks: list[tuple[int, float, Way | None]] = []
        self._told = 1

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def add(self, tokens: int, here_s: float, way: Way | None) -> None:
        """A chunk took the head so long, and is on its `way` through the others."""
        if len(self._chunks) < FIRST_CHUNKS:
            self._chunks.append((tokens, here_s, way))

    def tell(self, pace: "Pace") -> None:
        """Compares what has come back meanwhile with the first chunk."""
        while self._told < len(self._chunks):
            (few, seconds), (more, more_seconds) = map(self._slowest, (0, self._told))
            if seconds is None or more_seconds is None:
                return
            pace.compare(few, seconds, more, more_seconds)
            self._told += 1

    def _slowest(self, index: int) -> tuple[int, float | None]:
        tokens, here_s, way = self._chunks[index]
        if way is None:
            return tokens, here_s
        return tokens, None if way.slowest_s is None else max(here_s, way.slowest_s)


class Pace:
    """The size of prefill chunks: `most` tokens, or less for the sake of others.

    Such that a prompt is through all `stages` soonest, and that answers which run meanwhile don't
    wait too long for it.
    """

    def __init__(self, most: int, stages: int, knee: float = KNEE) -> None:
        self.most = most
        self._stages = stages
        self._knee = knee
        self._bearable = float(LEAST_TOKENS)
        self._step = 0.0

    def chunk(self, prompt: int, decoding: bool, first: bool = False) -> int:
        """Tokens of a chunk of so long a prompt; `decoding`: whether answers are running.

        P tokens in chunks of n are through S stages after P/n + S - 1 times the seconds of a
        chunk, which are as n + knee: least for n = sqrt(P * knee / (S - 1)). The first is half
        as large, which tells the knee and has the second stage begin sooner.
        """
        size = float(self.most)
        if self._stages > 1:
            size = math.sqrt(prompt * self._knee / (self._stages - 1))
        if decoding:
            size = min(size, self._bearable)
        size = min(max(round(size), LEAST_TOKENS), self.most)
        if first and self._stages > 1 and not decoding:
            return min(max(size // 2, PUSHED_TOKENS + 1), size)
        return size

    def compare(self, few: int, seconds: float, more: int, more_seconds: float) -> None:
        """Two chunks of a prompt took the slowest machine so long."""
        if more <= few:
            return
        a_token = max((more_seconds - seconds) / (more - few), 0.0)
        fixed = max(seconds - few * a_token, 0.0)
        knee = fixed / a_token if a_token else MOST_KNEE
        knee = min(max(knee, self._knee / TRUST), self._knee * TRUST)
        self._knee = min(max(math.sqrt(self._knee * knee), 1.0), MOST_KNEE)

    def note(self, seconds: float, prefilling: bool) -> None:
        """A lane's step took that long; `prefilling`: while a prompt was computed."""
        if not prefilling:
            self._step = seconds if not self._step else 0.9 * self._step + 0.1 * seconds
            return
        target = max(GAP, GAP_STEPS * self._step)
        change = min(max(target / seconds, 0.25), 1.25)
        self._bearable = min(max(self._bearable * change, LEAST_TOKENS), self.most)
