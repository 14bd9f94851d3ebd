"""llama.cpp by its own interface, in one process or over its RPC, and a GGUF to measure with.

`python -m bench.llamacpp serve ENDPOINT` is one of its RPC servers, and `answer FILE ENDPOINT...`
answers over such as `python -m node.worker.baseline` does.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from node.ggml.library import amx_is_broken, library_folder, llama, shared_library
from tests.support.tiny_gguf import save

ALL_LAYERS = 999  # llama.cpp takes as many as there are
LAYERS, HIDDEN, WIDE, HEADS, VOCAB = 12, 768, 3072, 12, 264
# llama.h: enum llama_ftype.
QUANTS = {"q4_0": 2, "bf16": 32}
PROMPT, DECODED, CONTEXT = 512, 60, 1024
ANSWER_CONTEXT = 2048
STARTED = 30.0
CPU = 0  # ggml-backend.h: enum ggml_backend_dev_type


def write_model(folder: Path, quant: str) -> Path:
    """A llama of 125 million random parameters."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32) / 30

    weights = {
        "token_embd.weight": random(VOCAB, HIDDEN),
        "output.weight": random(VOCAB, HIDDEN),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights[f"blk.{layer}.{name}.weight"] = random(HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            weights[f"blk.{layer}.{name}.weight"] = random(WIDE, HIDDEN)
        weights[f"blk.{layer}.ffn_down.weight"] = random(HIDDEN, WIDE)
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    own = {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": HIDDEN // HEADS,
        "attention.value_length": HIDDEN // HEADS,
        "rope.dimension_count": HIDDEN // HEADS,
    }
    full = save(folder / "f32.gguf", "llama", own, weights)
    lib, file = llama(), folder / f"{quant}.gguf"
    params = lib.llama_model_quantize_default_params()
    params.ftype = QUANTS[quant]
    lib.llama_model_quantize(str(full).encode(), str(file).encode(), ctypes.byref(params))
    full.unlink()
    return file


class Plain:
    """llama.cpp with one thread, its layers here or on RPC servers."""

    def __init__(self, file: Path, endpoints: Sequence[str] = (), context: int = CONTEXT) -> None:
        self._lib = lib = llama()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = ALL_LAYERS
        params.use_extra_bufts = not amx_is_broken()
        devices = [_remote_device(endpoint) for endpoint in endpoints]
        # Ended by a null; with none at all, everything is here.
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        params.devices = ctypes.addressof(self._devices)
        self._model = lib.llama_model_load_from_file(str(file).encode(), params)
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_threads, wanted.n_threads_batch = context, 1, 1
        wanted.n_ubatch = PROMPT
        self._context = lib.llama_init_from_model(self._model, wanted)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def run(self) -> tuple[float, float]:
        """Seconds of a prefill, and milliseconds a token."""
        began = time.perf_counter()
        answer = self.answer([i % 250 + 1 for i in range(PROMPT)], DECODED + 1)
        next(answer)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in answer:
            pass
        return prefill, (time.perf_counter() - began) / DECODED * 1e3

    def answer(self, prompt: list[int], tokens: int) -> Iterator[int]:
        """`tokens` ids after a prompt, greedy."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        fed = prompt
        for _ in range(tokens):
            self._decode(fed)
            fed = [self._best()]
            yield fed[0]

    def _decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))

    def _best(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


class RpcServers:
    """llama.cpp's own RPC servers, of one thread each; none if it was built without."""

    def __init__(self, count: int, settings: Mapping[str, str] | None = None) -> None:
        """`settings`: variables in their environment, such as another folder of libraries."""
        there = has_rpc() or bool(settings)
        self.endpoints = [f"127.0.0.1:{_free_port()}" for _ in range(count if there else 0)]
        self._environment = {**os.environ, **(settings or {})}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "RpcServers":
        for endpoint in self.endpoints:
            command = [sys.executable, "-m", "bench.llamacpp", "serve", endpoint]
            started = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=self._environment)
            self._processes.append(started)
        for endpoint in self.endpoints:
            _wait_for(endpoint)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL)  # it knows no other end
            process.wait()


def serve_rpc(endpoint: str) -> None:
    """Never returns."""
    ggml = shared_library("ggml")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(CPU))
    start = shared_library("ggml-rpc").ggml_backend_rpc_start_server
    start.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    start(endpoint.encode(), None, 1, 1, devices)


def _remote_device(endpoint: str) -> int:
    rpc, ggml = shared_library("ggml-rpc"), shared_library("ggml-base")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    server = ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(endpoint.encode()))
    return int(ggml.ggml_backend_reg_dev_get(server, ctypes.c_size_t(0)))


def has_rpc() -> bool:
    """Whether the llama.cpp that is installed was built with its RPC."""
    return any(library_folder().glob("*ggml-rpc.*"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(endpoint: str) -> None:
    host, port = endpoint.split(":")
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.05)
    raise SystemExit(f"llama.cpp's RPC server did not start at {endpoint} in {STARTED:.0f} s")


def _answers(file: str, endpoints: Sequence[str]) -> None:
    """Reads requests from standard input, and writes tokens, as `node.worker.baseline` does."""
    plain = Plain(Path(file), endpoints, ANSWER_CONTEXT)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for token in plain.answer(request["prompt"], request["tokens"]):
            print(token, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    verb, *rest = sys.argv[1:]
    if verb == "serve":
        serve_rpc(rest[0])
    else:
        _answers(rest[0], rest[1:])
