"""How much of a prompt is computed at a time."""

# What a running answer may have to wait for its next token while a prompt is prefilled: seconds,
# or that many times what a token takes undisturbed, if that is more.
GAP = 0.25
GAP_STEPS = 4
# Below this a chunk costs a machine as much time as a larger one: reading the weights.
LEAST_TOKENS = 32


class Pace:
    """The size of prefill chunks: `most` tokens, or less while answers would wait too long."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._size = float(most)
        self._step = 0.0

    def chunk(self, decoding: bool) -> int:
        """Tokens of the next chunk; `decoding`: whether answers are running."""
        return round(self._size) if decoding else self.most

    def note(self, seconds: float, prefilling: bool) -> None:
        """A lane's step took that long; `prefilling`: while a prompt was computed."""
        if not prefilling:
            self._step = seconds if not self._step else 0.9 * self._step + 0.1 * seconds
            return
        target = max(GAP, GAP_STEPS * self._step)
        change = min(max(target / seconds, 0.25), 1.25)
        self._size = min(max(self._size * change, LEAST_TOKENS, 1), self.most)
