"""A tokenizer from a GGUF's own metadata: llama.cpp's, behind the interface of transformers."""

import ctypes
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizer

from node.ggml.library import Complaint, llama
from unicluster.checkpoints.gguf import Header
from unicluster.errors import InputError

TEMPLATE = "tokenizer.chat_template"
# gguf.TokenType: control, user defined.
_MARKS = (3, 4)
_SPACES = " \t\n\u2581\u0120\u010a"  # some tokenizers have runs of them as such tokens
# Its types are stricter than what it takes.
_Tokenizer: Any = PreTrainedTokenizer


class GgufTokenizer(_Tokenizer):
    """Tokens and text as llama.cpp has them, special tokens in a prompt included."""

    # `apply_chat_template` is transformers' own, but for the tokenizing.
    renders_by_template = True

    def __init__(self, file: Path, header: Header) -> None:
        """`file`: its first bytes, up to the end of the header, are enough."""
        self._lib = lib = llama()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        with Complaint() as complaint:
            self._model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise InputError(f"{file}: llama.cpp can't read its tokenizer{complaint.reason}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._tokens = [str(token) for token in header.get("tokenizer.ggml.tokens", [])]
        self._types = [int(kind) for kind in header.get("tokenizer.ggml.token_type", [])]
        self._numbers = {token: number for number, token in enumerate(self._tokens)}
        super().__init__(
            bos_token=self._named(lib.llama_vocab_bos(self._vocab)),
            eos_token=self._named(lib.llama_vocab_eos(self._vocab)),
            chat_template=header.get(TEMPLATE),
            clean_up_tokenization_spaces=False,
        )

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        is_end = self._lib.llama_vocab_is_eog
        return {number for number in range(len(self._tokens)) if is_end(self._vocab, number)}

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._numbers)

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """Special tokens written out in `text` are taken for what they are."""
        data = text.encode()
        room = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), tokens, room, add_special_tokens, True
            )
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        tokens = [token_ids] if isinstance(token_ids, int) else [int(t) for t in token_ids]
        pieces = (self.piece(token, special=not skip_special_tokens) for token in tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:
        options.pop("return_dict", None)
        text = super().apply_chat_template(conversation, tokenize=False, **options)
        # A template writes its special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token's text; a special token's are its name."""
        return [self.piece(token) for token in range(len(self._tokens))]

    def special_ids(self) -> list[int]:
        """Tokens that mean something to the model, and are never part of a text."""
        lib, vocab = self._lib, self._vocab
        return [
            token
            for token in range(len(self._tokens))
            if lib.llama_vocab_is_control(vocab, token) or lib.llama_vocab_is_eog(vocab, token)
        ]

    def mark_ids(self) -> list[int]:
        """Special tokens, and those that llama.cpp takes for text, such as harmony's <|start|>."""
        named = enumerate(zip(self._tokens, self._types, strict=False))
        return [n for n, (text, kind) in named if kind in _MARKS and text.strip(_SPACES)]

    def piece(self, token: int, special: bool = True) -> bytes:
        """Bytes of one token. special: also of one that is no text, such as an end token."""
        room = 64
        while True:
            data = ctypes.create_string_buffer(room)
            count = self._lib.llama_token_to_piece(self._vocab, token, data, room, 0, special)
            if count >= 0:
                return data.raw[:count]
            room = -count

    def _named(self, token: int) -> str | None:
        return self._tokens[token] if 0 <= token < len(self._tokens) else None

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self._tokens[token] for token in self.encode(text, add_special_tokens=False)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._numbers.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]


def tokenizer_of(file: Path, header: Header) -> TokenizerWrapper:
    """mlx-lm's wrapper of a tokenizer, made from a GGUF alone."""
    tokenizer = GgufTokenizer(file, header)
    wrapper = TokenizerWrapper(tokenizer, NaiveStreamingDetokenizer, eos_token_ids=tokenizer.ends)
    wrapper.has_chat_template = tokenizer.chat_template is not None
    return wrapper
