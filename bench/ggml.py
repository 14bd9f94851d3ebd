"""Two stages of ggml against llama.cpp in one process, on one GGUF, one thread a stage.

`python -m bench.ggml`. The GGUF is a llama of 125 million random parameters, quantized by
llama.cpp. The stages are this process and a worker, over gRPC with mTLS; the two take turns in
rounds, and figures are medians.
"""

import argparse
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from node.config import WorkerConfig
from node.ggml.library import llama
from node.ggml.load import THREADS_ENV, Part, load, open_gguf, stage_file
from node.loader import Background
from node.mlx_thread import MLXThread
from node.pipeline import PipelineModel
from node.process import WorkerProcess
from node.ring import Ring
from node.worker import SWITCH_INTERVAL
from tests.tiny_gguf import save
from unicluster.fingerprint import whole
from unicluster.trust import Cluster
from unicluster.v1.stage_pb2 import RouteStop

LAYERS, HIDDEN, WIDE, HEADS, VOCAB = 12, 768, 3072, 12, 264
# llama.h: enum llama_ftype.
QUANTS = {"q4_0": 2, "bf16": 32}
PROMPT, DECODED, CONTEXT = 512, 60, 1024


def write_model(folder: Path, quant: str) -> Path:
    """The GGUF to measure with."""
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
    given = lib.llama_model_quantize_default_params()
    given.ftype = QUANTS[quant]
    lib.llama_model_quantize(str(full).encode(), str(file).encode(), ctypes.byref(given))
    full.unlink()
    return file


class Alone:
    """llama.cpp in this process, by its own interface."""

    def __init__(self, file: Path) -> None:
        self._lib = lib = llama()
        given = lib.llama_model_default_params()
        self._model = lib.llama_model_load_from_file(str(file).encode(), given)
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_threads, wanted.n_threads_batch = CONTEXT, 1, 1
        wanted.n_ubatch = PROMPT
        self._context = lib.llama_init_from_model(self._model, wanted)

    def run(self) -> tuple[float, float]:
        """Seconds of a prefill, and milliseconds a token."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        began = time.perf_counter()
        self._decode([i % 250 + 1 for i in range(PROMPT)])
        token = self._best()
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(DECODED):
            self._decode([token])
            token = self._best()
        return prefill, (time.perf_counter() - began) / DECODED * 1e3

    def _decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))

    def _best(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (VOCAB,)).argmax())


class Cut:
    """Stage 0 here and stage 1 in a worker."""

    def __init__(self, file: Path) -> None:
        self._background = Background()
        self._thread = MLXThread()
        identity = Cluster.new().issue("bench")
        half = LAYERS // 2
        config = WorkerConfig(
            node="second",
            model=str(file),
            quant="",
            first_layer=half,
            end_layer=LAYERS,
            context=CONTEXT,
            users=4,
            host="127.0.0.1",
            port=0,
            identity=identity.to_dict(),
            engine="ggml",
            finishes=True,
        )

        async def start() -> tuple[WorkerProcess, Ring]:
            worker = await WorkerProcess.start(config)
            async for event in worker.events():
                if event["event"] == "ready":
                    stop = RouteStop(node="second", address=f"127.0.0.1:{event['port']}")
                    return worker, await Ring.open([stop], identity)
            raise SystemExit((await worker.exit()).reason)

        self._worker, self._ring = self._background.run(start())
        checkpoint = whole(file)
        gguf = open_gguf(checkpoint)
        part = Part(0, half, finishes=False, context=CONTEXT, users=4)
        cut = stage_file(gguf, checkpoint, file.parent, part)
        self.front = load(gguf, file.parent, cut, part).front
        self._model = PipelineModel(self.front, self._ring, foresee=False)  # type: ignore[arg-type]

    def run(self) -> tuple[float, float]:
        """The same as Alone's."""
        return self._on_thread(self._run)

    def users(self, count: int) -> float:
        """Tokens a second of so many, each in a lane of its own."""
        return self._on_thread(lambda: self._users(count))

    def peak(self) -> int:
        """Of the worker's memory, in bytes."""
        lines = Path(f"/proc/{self._worker.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def close(self) -> None:
        self._background.run(self._ring.close())
        self._background.run(self._worker.stop())

    def _on_thread(self, action: Callable[[], Any]) -> Any:
        return self._background.run(self._thread.run(action))

    def _run(self) -> tuple[float, float]:
        model, cache = self._model, self._model.make_cache()
        tokens = [i % 250 + 1 for i in range(PROMPT)]
        began = time.perf_counter()
        for start in range(0, PROMPT - 1, 64):
            model(mx.array([tokens[start : min(start + 64, PROMPT - 1)]]), cache=cache)
        token = int(mx.argmax(model(mx.array([tokens[-1:]]), cache=cache)[0, -1]).item())
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(DECODED):
            token = int(mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]).item())
        return prefill, (time.perf_counter() - began) / DECODED * 1e3

    def _users(self, count: int) -> float:
        model = self._model
        caches = [model.make_cache() for _ in range(count)]
        waiting = [model(mx.array([[1 + i]]), cache=cache) for i, cache in enumerate(caches)]
        began = time.perf_counter()
        for _ in range(DECODED):
            for i, cache in enumerate(caches):
                token = int(mx.argmax(waiting[i][0, -1]).item())
                waiting[i] = model(mx.array([[token]]), cache=cache)
        for logits in waiting:
            mx.eval(logits[0, -1])
        return count * (DECODED + 1) / (time.perf_counter() - began)


def measure(folder: Path, quant: str, rounds: int) -> None:
    file = write_model(folder, quant)
    alone, cut = Alone(file), Cut(file)
    singles, pairs, many = [], [], []
    for _ in range(rounds):
        singles.append(alone.run())
        pairs.append(cut.run())
        many.append([cut.users(count) for count in (1, 2, 4)])
    prefill, step = (median(each[i] for each in singles) for i in range(2))
    cut_prefill, cut_step = (median(each[i] for each in pairs) for i in range(2))
    one, two, four = (median(each[i] for each in many) for i in range(3))
    stage = sum(f.stat().st_size for f in folder.rglob("*-6-12-out.gguf"))
    for what, figures in (
        ("ms a token", f"{step:.2f} alone, {cut_step:.2f} cut: {cut_step / step:.2f} x"),
        (
            f"s for a prompt of {PROMPT}",
            f"{prefill:.3f} alone, {cut_prefill:.3f} cut: {prefill / cut_prefill:.2f} x as fast",
        ),
        ("tokens a second", f"{one:.1f} of 1, {two / one:.2f} x of 2, {four / one:.2f} x of 4"),
        ("peak of a stage", f"{cut.peak() / 1e6:.0f} MB, its file {stage / 1e6:.0f} MB"),
    ):
        print(f"{quant:5} {what:22} {figures}", flush=True)
    cut.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", nargs="+", choices=QUANTS, default=list(QUANTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ[THREADS_ENV] = "1"
    sys.setswitchinterval(SWITCH_INTERVAL)
    for quant in options.quant:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_HOME"] = folder
            measure(Path(folder), quant, options.rounds)
    sys.stdout.flush()
    os._exit(0)  # MLX aborts a process that ends while another thread has streams


if __name__ == "__main__":
    main()
