"""The embedding of stage 0: rows of a tensor that stays in its file, or llama.cpp's own affair."""

import mmap
from pathlib import Path

import numpy as np

from node.ggml.cut import Gguf
from node.ggml.cutting.kinds import known
from node.ggml.library import Floats, Inputs, to_floats
from node.ggml.wire import Array
from unicluster.checkpoints.gguf import nbytes


class Lookup:
    """Token ids as they are: llama.cpp looks them up."""

    def __init__(self, gguf: Gguf) -> None:
        self.count = gguf.vocabulary

    def rows(self, tokens: Array) -> Inputs:
        """(batch, columns) in int32."""
        return tokens.astype(np.int32)


class Embedding(Lookup):
    """Token ids to hidden states, as llama.cpp does it; `folder` has the model's files."""

    def __init__(self, gguf: Gguf, folder: Path) -> None:
        super().__init__(gguf)
        file, tensor = gguf.tensors["token_embd.weight"]
        with (folder / file).open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = tensor.bytes[0]
        self._type = tensor.type
        self._width = gguf.hidden_size
        self._row_bytes = nbytes((self._width,), tensor.type)
        self._scale = np.sqrt(np.float32(self._width)) if known(gguf.header).scaled else None

    def rows(self, tokens: Array) -> Floats:
        """(batch, columns) to (batch, columns, hidden) in float32."""
        flat = tokens.ravel()
        raw = b"".join(self._row(int(token)) for token in flat)
        rows = to_floats(raw, self._type, len(flat) * self._width)
        if self._scale is not None:
            rows = rows * self._scale
        return rows.reshape(*tokens.shape, self._width)

    def _row(self, token: int) -> bytes:
        start = self._start + token * self._row_bytes
        return self._data[start : start + self._row_bytes]
