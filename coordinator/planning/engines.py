"""Facts about the engines that compute stages: the one place where they differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field

QUANTIZED = "quantized"


@dataclass(frozen=True)
class Engine:
    """One engine, as planning sees it.

    name: on the wire and in options. title: in tables, library: in sentences, for people.
    reads_gguf: its checkpoints are GGUFs; else safetensors.
    head_makes_logits: its head takes the last hidden state back and computes norm and lm_head;
    else the last stage of the ring must.
    quantizes_kv: its KV caches can be quantized.
    cpu_share: the part of BANDWIDTH_SHARE that its CPU backend gets, by quant; QUANTIZED is for
    every quantization that is not named, and 1 for what is not there at all.
    missing: of a machine without it, after the machine's name.
    """

    name: str
    title: str
    library: str
    reads_gguf: bool
    head_makes_logits: bool
    quantizes_kv: bool
    missing: str
    cpu_share: Mapping[str, float] = field(default_factory=dict)


# The order is that of preference, where two are equally fast.
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="mlx",
            title="MLX",
            library="MLX",
            reads_gguf=False,
            head_makes_logits=True,
            quantizes_kv=True,
            missing="has no MLX installed",
            # Its CPU backend computes on one thread: on a machine whose memory gives 25 GB/s it
            # read 2.0 GB/s in bfloat16, 1.5 in 8 bits and 1.0 in 4. (In float32 it was 2.8; but
            # those are toys, of which predictions stay what the memory allows.)
            cpu_share={"bfloat16": 0.1, "float16": 0.1, QUANTIZED: 0.05},
        ),
        Engine(
            name="ggml",
            title="ggml",
            library="llama.cpp",
            reads_gguf=True,
            head_makes_logits=False,
            quantizes_kv=False,
            missing="has no llama.cpp: on it, pip install 'unicluster[ggml]', then join again",
        ),
    )
}

# The engine meant where a message or a file names none: those are older than the second engine.
DEFAULT = next(iter(ENGINES))


def for_checkpoint(*, gguf: bool) -> Engine:
    """The engine that loads GGUFs, or the one that loads safetensors."""
    return next(engine for engine in ENGINES.values() if engine.reads_gguf == gguf)
