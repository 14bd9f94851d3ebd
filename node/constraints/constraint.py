"""A constraint on one answer: a mask over the vocabulary for each token of its text."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from node.constraints.grammar import LIMITS, grammar_of, shortened
from node.constraints.phase import Phase, exits, openings
from node.constraints.vocabulary import Vocabulary
from unicluster.errors import InputError, StageError
from unicluster.v1 import chat_pb2


class Constraint:
    """Masks the logits of one answer, so that its text matches a grammar.

    Its reasoning is free, but that it must end: the grammar begins with the text. An answer may
    begin with one of `marks`, token ids by which it goes over into its reasoning. Used by one
    thread at a time.
    `error` is set once the grammar can't be followed any longer, within llguidance's limits.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        phase: Phase,
        prompt_tokens: int,
        vocabulary: int,
        marks: Iterable[Sequence[int]] = (),
        leaving: Iterable[int] = (),
    ) -> None:
        """`vocabulary`: tokens that the matcher knows; logits may be wider.

        `leaving`: tokens by which reasoning would end without a text to follow.
        """
        self.error: StageError | None = None
        self._matcher = matcher
        self._phase = phase
        self._taken = prompt_tokens  # tokens of prompt and answer that are taken in
        self._vocabulary = vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)
        # Marks that the answer may begin with, then what is left of the ones begun.
        self._marks = [list(mark) for mark in marks] if phase.is_text else []
        self._in_mark = False
        self._free = np.ones(vocabulary, dtype=np.bool_)
        self._free[list(leaving)] = False
        self._mask: np.ndarray[Any, Any] | None = None
        self._current = False  # whether `_mask` is that of the next token

    @property
    def taken(self) -> int:
        """Tokens of prompt and answer that are taken in."""
        return self._taken

    @property
    def applies(self) -> bool:
        """Whether the grammar says anything of the next token."""
        return self._phase.is_text and self.error is None

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes in the answer's newest tokens, and makes the next token's mask.

        To be called while logits are being computed elsewhere: the mask takes no time of theirs.
        """
        for token in tokens:
            self._take(token)
        self._taken += len(tokens)
        if not self._current:
            self._mask, self._current = self._next_mask(), True

    def allowed(self, drafts: Sequence[int]) -> int:
        """Number of drafted tokens, from the first on, that the grammar lets pass."""
        if not self.applies or self._marks:
            return len(drafts)
        return int(self._matcher.validate_tokens(list(drafts)))

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """A logits processor of mlx-lm: tokens of prompt and answer, logits (1, vocabulary)."""
        fresh: Any = tokens[self._taken :].tolist() if len(tokens) > self._taken else []
        self.follow(fresh)
        if self._mask is None:
            return logits
        mask = np.zeros(logits.shape[-1], dtype=np.bool_)
        mask[: len(self._mask)] = self._mask[: len(mask)]
        return mx.where(mx.array(mask), logits, -mx.inf)

    def _take(self, token: int) -> None:
        self._current = False
        rest = [mark[1:] for mark in self._marks if mark[0] == token]
        if rest:
            self._marks = [mark for mark in rest if mark]
            self._in_mark = bool(self._marks)
        else:
            self._marks = []
            if self.applies:
                self._matcher.consume_token(token)
                self._check()
                self._phase.settle()
        self._phase.add(token)

    def _next_mask(self) -> "np.ndarray[Any, Any] | None":
        """Booleans (vocabulary,); None where every token may come."""
        starts = [mark[0] for mark in self._marks]
        if self._in_mark:
            mask = np.zeros(self._vocabulary, dtype=np.bool_)
        elif self.error is not None:
            return None
        elif not self._phase.is_text:
            return self._free
        else:
            fill_next_token_bitmask(self._matcher, self._bits)
            self._check()
            if self.error is not None:
                return None
            bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
            mask = bits[: self._vocabulary].astype(np.bool_)
        mask[starts] = True
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = shortened(self._matcher.get_error())
            self.error = StageError(f"the answer's constraint can't be followed: {reason}")


def constraint_of(
    request: chat_pb2.GenerateRequest, vocabulary: Vocabulary, state: str, prompt_tokens: int
) -> Constraint | None:
    """The constraint that a request asks for; blocks while its grammar is compiled.

    `state` is where the answer begins: "normal", "reasoning", ... Raises InputError, which begins
    with the field's name, for what can't be constrained.
    """
    if not request.HasField("constraint"):
        return None
    if request.ignore_eos:
        raise InputError("ignore_eos: a constrained answer ends where its grammar does")
    grammar = grammar_of(request.constraint)
    tokens = vocabulary.get()
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise InputError(f"constraint: {shortened(matcher.get_error())}")
    tokenizer = vocabulary.tokenizer
    constraint = Constraint(
        matcher,
        Phase(tokenizer, state),
        prompt_tokens,
        tokens.vocab_size,
        marks=openings(tokenizer),
        leaving=exits(tokenizer),
    )
    constraint.follow([])
    if constraint.error is not None:
        raise InputError(f"constraint: allows no text at all, or none in time: {constraint.error}")
    return constraint
