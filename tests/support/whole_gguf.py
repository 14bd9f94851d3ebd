"""llama.cpp's opinion of answers, with the whole file: `python -m tests.support.whole_gguf FILE`.

In a process apart, as whoever has llama.cpp alone would run it. Reads from standard input, as
JSON, a list of answers, [prompt, answer] in token ids, and writes for each way of computing
attention (WAYS) by how much llama.cpp would have preferred another token, in logits, at each of
the answer's tokens: 0 where it chooses the same.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from node.ggml.layers import CPU_STEP
from tests.support.cluster import ROOT
from tests.support.deadlines import scaled

# llama.cpp's choice is flash attention; of a GGUF on a CPU stages of ggml do without.
WAYS = ("default", "no flash attention")
CONTEXT = 2048

Answers = Sequence[tuple[Sequence[int], Sequence[int]]]


def gaps(file: Path, answers: Answers, threads: int = 1) -> dict[str, list[list[float]]]:
    """Runs the program: for each of WAYS, answer by answer, the gap at each token."""
    command = [sys.executable, "-m", "tests.support.whole_gguf", str(file), str(threads)]
    made = subprocess.run(
        command,
        input=json.dumps(answers),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=scaled(120),
        check=True,
    )
    found: dict[str, list[list[float]]] = json.loads(made.stdout.splitlines()[-1])
    return found


class _Whole:
    """A whole GGUF in llama.cpp's own context."""

    def __init__(self, model: Any, way: str, threads: int) -> None:
        from llama_cpp import llama_cpp as lib

        self._lib: Any = lib
        params = lib.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        params.n_ubatch = CPU_STEP
        if way != WAYS[0]:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._lib.llama_init_from_model(model, params)
        self._width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._decode(prompt[:-1])
        found, last = [], prompt[-1]
        for token in answer:
            logits = self._decode([last])
            found.append(float(logits.max() - logits[token]))
            last = token
        return found

    def _decode(self, tokens: Sequence[int]) -> Any:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._lib.llama_batch_get_one(array, len(tokens))
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp can't compute this prompt")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._width,)).copy()


def main() -> None:
    from llama_cpp import llama_cpp as lib

    file, threads = sys.argv[1:]
    answers = json.load(sys.stdin)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    found = {}
    for way in WAYS:
        whole = _Whole(model, way, int(threads))
        found[way] = [whole.gaps(prompt, answer) for prompt, answer in answers]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
