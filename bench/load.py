"""Loading half of a checkpoint of 2 GB in several files: peak memory and time of its stage.

`python -m bench.load [--folder DIR]`. Peak memory is the worker's VmHWM, so this is for Linux.
Cold means that the files were dropped from the page cache; the disk's own speed is that of
reading the same bytes in the same run.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from tests.support.tiny import tiny_config, write_tokenizer
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec

HIDDEN, WIDE, LAYERS = 2048, 8192, 16
GROUP = 64
PER_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
LIMIT_FACTOR, LIMIT_BYTES = 1.10, 400e6


def write_checkpoint(path: Path, bits: int | None) -> Path:
    """A llama of random weights, bfloat16 or quantized, one file for every two layers."""
    path.mkdir(parents=True)
    config = tiny_config("llama") | {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": HIDDEN // 16,
    }
    if bits is not None:
        config["quantization"] = {"group_size": GROUP, "bits": bits}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    vocabulary = config["vocab_size"]
    outside = {"model.norm.weight": mx.ones(HIDDEN, mx.bfloat16)}
    tables = ["model.embed_tokens"] + ["lm_head"] * (not config.get("tie_word_embeddings"))
    for name in tables:
        outside |= _weight(name, (vocabulary, HIDDEN), bits)
    mx.save_safetensors(str(path / "model-00000.safetensors"), outside, {"format": "mlx"})
    for first in range(0, LAYERS, 2):
        weights: dict[str, mx.array] = {}
        for layer in (first, first + 1):
            prefix = f"model.layers.{layer}."
            for name, shape in PER_LAYER.items():
                weights |= _weight(prefix + name, shape, bits)
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[f"{prefix}{name}.weight"] = mx.ones(HIDDEN, mx.bfloat16)
        file = path / f"model-{first + 1:05}.safetensors"
        mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return path


def _weight(name: str, shape: tuple[int, int], bits: int | None) -> dict[str, mx.array]:
    array = (mx.random.normal(shape) / 50).astype(mx.bfloat16)
    if bits is None:
        return {f"{name}.weight": array}
    parts = mx.quantize(array, group_size=GROUP, bits=bits)
    return {
        f"{name}.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=True)
    }


def drop_from_cache(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_seconds(path: Path) -> float:
    """To read the files of the second half, cold."""
    drop_from_cache(path)
    began = time.perf_counter()
    for file in sorted(path.glob("model-*.safetensors"))[1 + LAYERS // 4 :]:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    return time.perf_counter() - began


async def load(path: Path, quant: str) -> tuple[float, int, int]:
    """Seconds of loading the second half, the stage's bytes, and the worker's peak memory."""
    half = LAYERS // 2
    config = WorkerConfig(
        StageSpec(model=str(path), quant=quant, first_layer=half, end_layer=LAYERS, users=1),
        node="bench",
        host="127.0.0.1",
        port=0,
        identity=Cluster.new().issue("bench").to_dict(),
    )
    worker = await WorkerProcess.start(config)
    began = 0.0
    try:
        async for event in worker.events():
            began = began or time.perf_counter()
            if event["event"] == "ready":
                seconds = time.perf_counter() - began
                return seconds, int(event["weight_bytes"]), _peak(worker.pid)
        raise SystemExit((await worker.exit()).reason)
    finally:
        await worker.stop()


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", help="where to write the checkpoints (default: a temporary one)"
    )
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        measure(Path(folder))


def measure(folder: Path) -> None:
    layer = sum(a * b for a, b in PER_LAYER.values()) * 2
    print(f"{'':18}{'stage':>9}{'peak':>9}{'limit':>9}{'cold':>8}{'warm':>8}{'disk':>8}")
    cases: list[tuple[str, int | None, str]] = [
        ("bf16", None, ""),
        ("bf16 to q4", None, "q4"),
        ("q8 as stored", 8, ""),
    ]
    paths: dict[Any, Path] = {}
    for name, bits, quant in cases:
        if bits not in paths:
            paths[bits] = write_checkpoint(folder / f"bits-{bits}", bits)
        disk = disk_seconds(paths[bits])
        drop_from_cache(paths[bits])
        cold, size, peak = asyncio.run(load(paths[bits], quant))
        warm, _, again = asyncio.run(load(paths[bits], quant))
        limit = size * LIMIT_FACTOR + LIMIT_BYTES + (layer if quant else 0)
        megabytes = "".join(f"{value / 1e6:7.0f}MB" for value in (size, max(peak, again), limit))
        print(f"{name:18}{megabytes}{cold:7.2f}s{warm:7.2f}s{disk:7.2f}s", flush=True)


if __name__ == "__main__":
    main()
