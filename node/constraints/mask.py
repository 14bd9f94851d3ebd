"""A logits processor that lets an answer choose only among allowed tokens, one by one."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from node.constraints.grammar import shortened
from node.constraints.numbers import NumberLimit
from unicluster.errors import AnswerError

Allowed = np.ndarray[Any, np.dtype[np.bool_]]

# Seconds for a mask, up to which a frame waits for it: sending all logits back takes longer.
QUICK_S = 1e-3
# How much the latest mask's time counts in their mean.
LATEST = 0.25


class Filter(ABC):
    """Masks the logits of one answer. Used by one thread at a time.

    `error` is set once the answer can't be followed any longer.
    """

    def __init__(self, prompt_tokens: int, vocabulary: int) -> None:
        """`vocabulary`: tokens that are known; logits may be wider."""
        self.error: AnswerError | None = None
        self.taken = prompt_tokens  # tokens of prompt and answer that are taken in
        self._vocabulary = vocabulary
        self._mask: Allowed | None = None
        self._current = False  # whether `_mask` is that of the next token
        self._mask_s = 0.0  # of the thread's time, in the mean of the latest masks

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes in the answer's newest tokens, and makes the next token's mask.

        To be called while logits are being computed elsewhere: the mask takes no time of theirs.
        Or before, where it is quick, so that the token can be chosen there.
        """
        began = time.thread_time()
        for token in tokens:
            self._take(token)
        self.taken += len(tokens)
        if tokens or not self._current:
            self._mask, self._current = self._next_mask(), True
            if self.error is not None:
                self._mask = None
            self._mask_s += LATEST * (time.thread_time() - began - self._mask_s)

    @property
    def is_quick(self) -> bool:
        """Whether masks take so little time that a frame can wait for the next one."""
        return self._mask_s <= QUICK_S

    def narrow(self, allowed: Allowed | None) -> Allowed | None:
        """Mask (vocabulary,) of the next token's candidates that it lets pass; None for all.

        All tokens of the answer have to be taken in.
        """
        if self._mask is None or allowed is None:
            return allowed if self._mask is None else self._mask
        known = min(len(self._mask), len(allowed))  # none beyond may come
        return self._mask[:known] & allowed[:known]

    @abstractmethod
    def allowed(self, drafts: Sequence[int]) -> int:
        """Number of drafted tokens, from the first on, that are let pass."""

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """A logits processor of mlx-lm: tokens of prompt and answer, logits (1, vocabulary)."""
        fresh: Any = tokens[self.taken :].tolist() if len(tokens) > self.taken else []
        self.follow(fresh)
        if self._mask is None or logits.shape[-1] == 1:  # the token was chosen elsewhere
            return logits
        mask = np.zeros(logits.shape[-1], dtype=np.bool_)
        mask[: len(self._mask)] = self._mask[: len(mask)]
        return mx.where(mx.array(mask), logits, -mx.inf)

    @abstractmethod
    def _take(self, token: int) -> None: ...

    @abstractmethod
    def _next_mask(self) -> Allowed | None:
        """Booleans (vocabulary,); None where every token may come."""

    def _only(self, tokens: Iterable[int]) -> Allowed:
        mask = np.zeros(self._vocabulary, dtype=np.bool_)
        mask[list(tokens)] = True
        return mask

    def _but(self, tokens: Iterable[int]) -> Allowed:
        mask = np.ones(self._vocabulary, dtype=np.bool_)
        mask[list(tokens)] = False
        return mask


def packed_mask(filters: Iterable[Filter], vocabulary: int) -> bytes | None:
    """The next token's mask by all filters, in order: a bit a token, the lowest of a byte first.

    None where each token may come; empty where none may. All tokens of the answer have to be taken
    in by the filters.
    """
    allowed: Allowed | None = None
    for each in filters:
        allowed = each.narrow(allowed)
    if allowed is None:
        return None
    mask = np.zeros(vocabulary, dtype=np.bool_)
    mask[: len(allowed)] = allowed[:vocabulary]
    return np.packbits(mask, bitorder="little").tobytes() if mask.any() else b""


class Mask(Filter):
    """A filter by a grammar of llguidance, within its limits."""

    def __init__(
        self,
        matcher: LLMatcher,
        prompt_tokens: int,
        vocabulary: int,
        numbers: NumberLimit | None = None,
    ) -> None:
        """`vocabulary`: tokens that the matcher knows; `numbers`: limit of those of its JSON."""
        super().__init__(prompt_tokens, vocabulary)
        self._matcher = matcher
        self._numbers = numbers
        self._bits = allocate_token_bitmask(1, vocabulary)

    def _consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._numbers is not None:
            self._numbers.take(token)
        self._check()

    def _of_grammar(self) -> Allowed:
        """Tokens that the grammar allows next, end tokens where it may end."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        allowed = bits[: self._vocabulary].astype(np.bool_)
        return allowed if self._numbers is None else self._numbers.limit(allowed)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = shortened(self._matcher.get_error())
            self.error = AnswerError(f"the answer's constraint can't be followed: {reason}")
