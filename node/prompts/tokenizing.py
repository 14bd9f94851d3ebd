"""Text to token ids, in steps between which it can be abandoned, and no more than can be used."""

from functools import cached_property
from typing import Any

from node.prompts.cancellation import Cancellation
from unicluster.errors import InputError

# Characters of one step. Of longer texts the tokens are counted in such pieces first, so that one
# with too many is refused early: then all of it is tokenized in one call, which can't be ended.
STEP = 1 << 15
LONG = 2 * STEP
# A cut between two pieces makes a few tokens more than there are in the whole.
TOKENS_AT_CUT = 16


class Tokenizing:
    """Tokenizes prompts for a context of `context` tokens. Usable from several threads."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context
        # Settings that a tokenizer comes with are changed by the first call: later ones only read.
        tokenizer.encode("a", add_special_tokens=False)

    @cached_property
    def most_bytes(self) -> int:
        """Bytes of text that the context can hold: so many of the longest token."""
        vocabulary = self._tokenizer.get_vocab()
        return self._context * max(len(token.encode()) for token in vocabulary)

    def check_length(self, size: int, field: str = "messages") -> None:
        """Raises InputError for a text of more bytes than the context can hold."""
        if size > self.most_bytes:
            raise InputError(
                f"{field}: the prompt has {size} bytes and the context of {self._context} tokens "
                f"holds at most {self.most_bytes}"
            )

    def encode(self, text: str, cancellation: Cancellation, *, special: bool = False) -> list[int]:
        """Token ids of a prompt. Raises InputError where they are too many.

        special: with the tokens that the tokenizer puts around plain text; a rendered template
        has its own.
        """
        field = "prompt" if special else "messages"
        self.check_length(len(text), field)
        if len(text) > LONG:
            self._count(text, field, cancellation)
        cancellation.check()
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def _count(self, text: str, field: str, cancellation: Cancellation) -> None:
        count, most = 0, self._context + self._context // 8
        for start in range(0, len(text), STEP):
            cancellation.check()
            piece = text[start : start + STEP]
            count += len(self._tokenizer.encode(piece, add_special_tokens=False))
            most += TOKENS_AT_CUT
            if count > most:
                raise InputError(
                    f"{field}: the prompt has more than {count} tokens and the context is "
                    f"{self._context}"
                )
