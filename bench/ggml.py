"""Two stages of ggml against llama.cpp in one process and over its RPC, one thread a stage.

`python -m bench.ggml`. The GGUF is a llama of 125 million random parameters, quantized by
llama.cpp. The stages are this process and a worker, over gRPC with mTLS; llama.cpp's RPC has two
servers, in the clear. They take turns in rounds, and figures are medians. RPC is measured if
llama.cpp has been built with it: CMAKE_ARGS=-DGGML_RPC=ON.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from bench.llamacpp import (
    CONTEXT,
    DECODED,
    LAYERS,
    PROMPT,
    QUANTS,
    Plain,
    RpcServers,
    write_model,
)
from node.ggml.load import THREADS_ENV, load, open_gguf
from node.ggml.stage_file import Part, stage_file
from node.inprocess.loader import Background
from node.pipeline.pipeline_model import PipelineModel
from node.ring.compute_thread import MLXThread
from node.ring.ring import Ring
from node.worker.__main__ import SWITCH_INTERVAL
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster.checkpoints.fingerprint import whole
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec
from unicluster.v1.stage_pb2 import RouteStop


class Cut:
    """Stage 0 here and stage 1 in a worker."""

    def __init__(self, file: Path) -> None:
        self._background = Background()
        self._thread = MLXThread()
        identity = Cluster.new().issue("bench")
        half = LAYERS // 2
        spec = StageSpec(
            model=str(file),
            first_layer=half,
            end_layer=LAYERS,
            context=CONTEXT,
            users=4,
            finishes=True,
        )
        config = WorkerConfig(
            spec, node="second", host="127.0.0.1", port=0, identity=identity.to_dict()
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
        part = Part(0, half, has_lm_head=False, context=CONTEXT, users=4)
        cut = stage_file(gguf, checkpoint, file.parent, part)
        self.front = load(gguf, file.parent, cut, part).front
        self._model = PipelineModel(self.front, self._ring, prebuilt=False)

    def run(self) -> tuple[float, float]:
        """Speeds of prefill and decode, as `Alone.run` measures them."""
        return self._on_thread(self._run)

    def users(self, count: int) -> float:
        """Tokens a second of `count` users, each in a separate lane."""
        return self._on_thread(lambda: self._users(count))

    def peak(self) -> int:
        """Peak of the worker's memory, in bytes."""
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
    with RpcServers(2) as servers:
        plain = {"alone": Plain(file)}
        if servers.endpoints:
            plain["RPC"] = Plain(file, servers.endpoints)
        cut = Cut(file)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*plain, "cut")}
        many = []
        for _ in range(rounds):
            for name, each in plain.items():
                runs[name].append(each.run())
            runs["cut"].append(cut.run())
            many.append([cut.users(count) for count in (1, 2, 4)])
        show(quant, runs, many)
        stage = sum(f.stat().st_size for f in folder.rglob("*-6-12-out.gguf"))
        peak, limit = cut.peak() / 1e6, stage * 1.05 / 1e6 + 300
        print(f"{quant:5} {'peak of a stage':22} {peak:.0f} MB, its file {stage / 1e6:.0f} MB")
        print(f"{quant:5} {'':22} that and 300 MB: {limit:.0f} MB", flush=True)
        cut.close()


def show(quant: str, runs: dict[str, list[tuple[float, float]]], many: list[list[float]]) -> None:
    """Medians, and how many times the single process's they are."""
    for index, (what, digits) in enumerate(((f"s for a prompt of {PROMPT}", 3), ("ms a token", 2))):
        took = {name: median(run[index] for run in all_runs) for name, all_runs in runs.items()}
        alone = took["alone"]
        told = (
            f"{name} {seconds:.{digits}f} ({seconds / alone:.2f} x)"
            for name, seconds in took.items()
        )
        print(f"{quant:5} {what:22} {', '.join(told)}")
    one, two, four = (median(each[i] for each in many) for i in range(3))
    told = f"{one:.1f} of 1, {two / one:.2f} x of 2, {four / one:.2f} x of 4"
    print(f"{quant:5} {'tokens a second':22} {told}", flush=True)


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
