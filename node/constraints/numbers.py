"""Ends of numbers in JSON: schemas don't limit their digits, and small models go on for ever."""

from collections.abc import Iterable

import numpy as np
from llguidance import LLTokenizer

Tokens = np.ndarray[tuple[int], np.dtype[np.bool_]]

# A double has 17 significant digits, and 24 characters at most.
LONGEST_NUMBER = 32
_PARTS = frozenset(b"0123456789.eE+-")
_GOING_ON = frozenset(b"0123456789.eE")
_AFTER = frozenset(b",]} \t\r\n")


class NumberTokens:
    """Which tokens of a vocabulary are parts of numbers, and which may stand after one."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        """Takes some microseconds a token."""
        texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        firsts = [text[0] if text else -1 for text in texts]
        # Characters of a token that is a part of a number and nothing else; of others 0.
        self.lengths = [len(text) if _PARTS.issuperset(text) else 0 for text in texts]
        self.going_on = _among(firsts, _GOING_ON)
        self.after = _among(firsts, _AFTER)
        self.after[list(tokenizer.eos_tokens)] = True
        self.quotes = _among(firsts, frozenset(b'"'))


class NumberLimit:
    """Follows one answer's JSON, and ends numbers of LONGEST_NUMBER characters that may end."""

    def __init__(self, tokens: NumberTokens) -> None:
        self._tokens = tokens
        self._length = 0  # characters of numbers alone since another token came

    def take(self, token: int) -> None:
        """Takes in the next token of the JSON."""
        added = self._tokens.lengths[token]
        self._length = self._length + added if added else 0

    def limit(self, allowed: Tokens) -> Tokens:
        """Mask (vocabulary,) of the allowed tokens that still are: some of them, or all.

        Digits of a string are not limited: it may go on with a quote, or can't end yet.
        """
        tokens = self._tokens
        if self._length < LONGEST_NUMBER or (allowed & tokens.quotes).any():
            return allowed
        return allowed & ~tokens.going_on if (allowed & tokens.after).any() else allowed


def _among(firsts: Iterable[int], wanted: frozenset[int]) -> Tokens:
    return np.fromiter((first in wanted for first in firsts), dtype=np.bool_)
