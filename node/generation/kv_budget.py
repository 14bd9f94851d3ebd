"""KV budget of all machines together: bytes reserved for answers, and the rest for reuse."""

from collections.abc import Iterable
from typing import Any

from node.mlx.compat_caches import GROWTH_TOKENS, grows_with_tokens, leaves


class KVBudget:
    """`total` bytes for `users` answers at the full context; 0: unknown, no limit.

    `kinds` are fresh caches of all layers. Where all of them grow with every token, less is
    reserved for a short answer than for the full context; others reach most of their size early.
    """

    def __init__(self, total: int, users: int, context: int, kinds: Iterable[Any]) -> None:
        self.total = total
        self._answer_limit = total // users
        self._context = context
        # Caches that grow with their tokens are those that can be trimmed at any time.
        self.grows = all(map(grows_with_tokens, leaves(kinds)))

    def answer_bytes(self, tokens: int) -> int:
        """Bytes of KV cache for one answer of `tokens`, prompt included."""
        if not self.grows:
            return self._answer_limit
        rounded = min(-(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS, self._context)
        return -(-self._answer_limit * rounded // self._context)

    def share_bytes(self, tokens: int) -> int:
        """Bytes of KV cache of so many tokens, as if all of it grew with them."""
        return -(-self._answer_limit * tokens // self._context)

    def batch_bytes(self, tokens: Iterable[int]) -> int:
        """Bytes of KV cache for answers in one batch, which mlx-lm pads to the longest."""
        sizes = list(tokens)
        return len(sizes) * self.answer_bytes(max(sizes)) if sizes else 0
