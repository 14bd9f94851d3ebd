"""How much of a prompt is computed at a time."""

# What a running answer may have to wait for its next token while a prompt is prefilled: seconds,
# or that many times what a token takes undisturbed, if that is more.
GAP = 0.25
GAP_STEPS = 4
# Below this a chunk costs a machine as much time as a larger one: reading the weights.
LEAST_TOKENS = 24
# The last chunk is computed by one machine at a time, so there are that many for each machine
# after the first: stages are idle for a twenty-first of the time.
CHUNKS_PER_STAGE = 20


class Pace:
    """The size of prefill chunks: `most` tokens, or less for the sake of others.

    Small enough to keep all `stages` busy, and while answers run, that they don't wait too long.
    """

    def __init__(self, most: int, stages: int) -> None:
        self.most = most
        self._stages = stages
        self._bearable = float(LEAST_TOKENS)
        self._step = 0.0

    def chunk(self, prompt: int, decoding: bool) -> int:
        """Tokens of a chunk of so long a prompt; `decoding`: whether answers are running."""
        size = self.most
        if self._stages > 1:
            size = -(-prompt // (CHUNKS_PER_STAGE * (self._stages - 1)))
        if decoding:
            size = min(size, round(self._bearable))
        return min(max(size, LEAST_TOKENS), self.most)

    def note(self, seconds: float, prefilling: bool) -> None:
        """A lane's step took that long; `prefilling`: while a prompt was computed."""
        if not prefilling:
            self._step = seconds if not self._step else 0.9 * self._step + 0.1 * seconds
            return
        target = max(GAP, GAP_STEPS * self._step)
        change = min(max(target / seconds, 0.25), 1.25)
        self._bearable = min(max(self._bearable * change, LEAST_TOKENS), self.most)
