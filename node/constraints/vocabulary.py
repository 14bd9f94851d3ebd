"""A model's tokens as llguidance knows them: made once, when the first constraint asks for them."""

import copy
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from llguidance import LLTokenizer, TokenizerWrapper

from node.constraints.numbers import NumberTokens
from node.tools.formats import Dialect
from unicluster.errors import InputError


class BytesTokenizer(Protocol):
    """A tokenizer that says which bytes each of its tokens is: that of a GGUF."""

    eos_token_id: int
    bos_token_id: int | None

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token; a special token's are those of its name."""
        ...

    def special_ids(self) -> list[int]:
        """The tokens that no text of a user's may become."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Vocabulary:
    """llguidance's form of a tokenizer. Any thread may ask for it."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: mlx-lm's wrapper of one."""
        self.tokenizer = tokenizer
        self.dialect = Dialect(tokenizer)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None
        self._numbers: NumberTokens | None = None

    def get(self) -> LLTokenizer:
        """Takes about a second the first time; raises InputError where it can't be made."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def numbers(self) -> NumberTokens:
        """The tokens of numbers; made once, as `get` makes what it gives."""
        known = self.get()
        with self._lock:
            if self._numbers is None:
                self._numbers = NumberTokens(known)
            return self._numbers

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of one of the model's marks; none for no text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def special(self) -> dict[str, int]:
        """Tokens that no text can become, by name, longest names first."""
        known = self.get()
        names = (
            (name, number)
            for name, number in self.tokenizer.get_vocab().items()
            if number < known.vocab_size and known.is_special_token(number)
        )
        return dict(sorted(names, key=lambda pair: -len(pair[0])))

    def _make(self) -> LLTokenizer:
        ends = sorted(self.tokenizer.eos_token_ids)
        if hasattr(self.tokenizer, "token_bytes"):
            return LLTokenizer(TokenizerWrapper(_Greedy(self.tokenizer, ends)), eos_token=ends)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("constraint: answers of this model's tokenizer can't be constrained")
        backend = copy.copy(self.tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return LLTokenizer(backend.to_str(), n_vocab=len(self.tokenizer), eos_token=ends)


class _Greedy:
    """The attributes and the call that llguidance's wrapper asks for."""

    def __init__(self, tokenizer: BytesTokenizer, ends: Sequence[int]) -> None:
        self.tokens = tokenizer.token_bytes()
        self.special_token_ids = tokenizer.special_ids()
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)
