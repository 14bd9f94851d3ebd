"""KV bytes, all machines together: what is promised to answers, and what is left for reuse."""

from collections.abc import Iterable
from typing import Any

from node.mlx.compat_caches import GROWTH_TOKENS, grows_with_tokens, leaves


class Memory:
    """Room for `users` answers at the full context in `total` bytes; 0: not known, no limit.

    `kinds` are fresh caches of all layers. Where all of them grow with every token, a short
    answer is promised less than the full context; others reach much of their size early.
    """

    def __init__(self, total: int, users: int, context: int, kinds: Iterable[Any]) -> None:
        self.total = total
        self._most = total // users
        self._context = context
        # So do those that can be cut back at any time.
        self.grows = all(map(grows_with_tokens, leaves(kinds)))

    def need(self, tokens: int) -> int:
        """Bytes of an answer of so many tokens, prompt included."""
        if not self.grows:
            return self._most
        rounded = min(-(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS, self._context)
        return -(-self._most * rounded // self._context)

    def need_together(self, tokens: Iterable[int]) -> int:
        """Bytes of answers in one batch: mlx-lm pads them to the longest."""
        sizes = list(tokens)
        return len(sizes) * self.need(max(sizes)) if sizes else 0
