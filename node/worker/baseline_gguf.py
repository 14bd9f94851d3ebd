"""A whole GGUF in one context of llama.cpp with its default settings, to compare stages with."""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from node.ggml.library import amx_is_broken, llama
from node.ggml.load import DEFAULT_CONTEXT, threads
from unicluster.errors import StageError


class WholeGguf:
    """Greedy answers, one at a time; with as many threads as a stage has."""

    def __init__(self, file: Path) -> None:
        """`file`: the first one of a split GGUF. Raises StageError when it can't be loaded."""
        self._lib = lib = llama()
        params = lib.llama_model_default_params()
        params.use_extra_bufts = not amx_is_broken()
        self._model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise StageError(f"llama.cpp can't load {file}: its log says why")
        wanted = lib.llama_context_default_params()
        wanted.n_ctx = min(DEFAULT_CONTEXT, lib.llama_model_n_ctx_train(self._model))
        wanted.n_threads = wanted.n_threads_batch = threads()
        self._most = int(wanted.n_batch)
        self._context = lib.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise StageError(f"llama.cpp has no room for the KV cache of {file}")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def answer(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """`tokens` ids after a prompt, end tokens among them. Raises StageError as it computes."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        for start in range(0, len(prompt), self._most):
            self._decode(prompt[start : start + self._most])
        for number in range(tokens):
            token = self._best()
            yield token
            if number + 1 < tokens:
                self._decode([token])

    def _decode(self, tokens: Sequence[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self._lib.llama_decode(
            self._context, self._lib.llama_batch_get_one(array, len(tokens))
        )
        if status:
            raise StageError(f"llama.cpp failed to compute {len(tokens)} tokens (status {status})")

    def _best(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
