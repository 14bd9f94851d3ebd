"""How much of a prompt is computed at a time."""

import math

from node.pipeline import PUSHED_TOKENS

# What a running answer may have to wait for its next token while a prompt is prefilled: seconds,
# or that many times what a token takes undisturbed, if that is more.
GAP = 0.25
GAP_STEPS = 4
# Smaller ones would be mostly Python.
LEAST_TOKENS = 24
# Until it is measured: the tokens whose computing takes as long as what a chunk takes anyway,
# whatever its size: reading the weights, starting kernels. Few on a CPU, hundreds on a GPU.
KNEE = 16.0
MOST_KNEE = 4096.0
# One measurement, which may be off by much, moves it by no more than this factor.
TRUST = 16.0


class Pace:
    """The size of prefill chunks: `most` tokens, or less for the sake of others.

    Such that a prompt is through all `stages` soonest, and that answers which run meanwhile don't
    wait too long for it.
    """

    def __init__(self, most: int, stages: int) -> None:
        self.most = most
        self._stages = stages
        self._knee = KNEE
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
        """The first two chunks of a prompt took so long to compute at the head."""
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
