"""Bytes that one token stands for, which may be a part of a character only."""

from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

# SentencePiece writes a space so.
_SPACE = "\u2581".encode()


class TokenBytes:
    """Bytes of single tokens of `tokenizer`, which is mlx-lm's wrapper."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Any = tokenizer.detokenizer

    def of(self, token: int) -> bytes:
        """Bytes of a token in the middle of a text."""
        if isinstance(self._detokenizer, BPEStreamingDetokenizer):
            return _of_byte_level(self._detokenizer.tokenmap[token])
        if isinstance(self._detokenizer, SPMStreamingDetokenizer):
            return bytes(self._detokenizer.tokenmap[token]).replace(_SPACE, b" ")
        if (piece := getattr(self._tokenizer, "piece", None)) is not None:  # of a GGUF
            return bytes(piece(token))
        return str(self._tokenizer.decode([token])).encode()


def _of_byte_level(token: str) -> bytes:
    return b"".join(_BYTES.get(character) or character.encode() for character in token)


def _alphabet() -> dict[str, bytes]:
    """The characters of byte-level BPE: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + at): bytes([byte]) for at, byte in enumerate(others)}


_BYTES = _alphabet()
