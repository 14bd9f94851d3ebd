"""Variants of tiny GGUFs: other metadata and tensors than files of a kind usually have."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.support.any_gguf import SPECS, Spec

PATTERN, RECURRENT = "attention.sliding_window_pattern", "attention.recurrent_layers"
INTERVAL, DENSE = "full_attention_interval", "leading_dense_block_count"
HEADS, KV_HEADS = "attention.head_count", "attention.head_count_kv"
UNTIED, FREQUENCIES = "output.weight", "rope_freqs.weight"
FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")

FLAGS = [True, False, True, True, False, False, True, True, True, False, True, False]
WINDOWS = ("gemma2", "gemma3", "gpt-oss", "cohere2", "cohere2moe", "exaone-moe", "mellum")
INTERVALS = ("qwen3next", "qwen35", "qwen35moe")
DENSE_FIRST = ("deepseek2", "glm4moe", "deepseek", "dots1", "exaone-moe", "afmoe", "kimi-linear")
PREDICTS = (
    *("glm4moe", "deepseek2", "deepseek32", "glm-dsa", "deepseek4", "hy_v3", "bailingmoe2"),
    *("qwen3next", "qwen35", "qwen35moe", "mimo2", "step35", "exaone-moe", "bailingmoe3"),
    "cohere2moe",
)
UNEQUAL = ("deci", "openelm")
WITH_OUTPUT = ("llama", "qwen3", "gemma3", "qwen3next", "glm4moe", "lfm2", "deepseek2", "smollm3")


def further(architecture: str, metadata: dict[str, Any], *names: str, layers: int = 0) -> Spec:
    """The usual model with other metadata, and further tensors of those names."""
    spec = SPECS[architecture]
    return replace(
        spec, layers=layers or spec.layers, metadata=spec.metadata | metadata, further=names
    )


def predicting(architecture: str) -> Spec:
    """The usual model with a layer behind it that predicts a further token."""
    spec = SPECS[architecture]
    arrays = {
        key: [*value, value[-1]]
        for key, value in spec.metadata.items()
        if isinstance(value, list) and len(value) == spec.layers
    }
    later = arrays | {"nextn_predict_layers": 1, "block_count": spec.layers + 1}
    return replace(spec, further=(f"blk.{spec.layers}.nextn.eh_proj.weight",), later=later)


def _all() -> Iterator[tuple[str, str, Spec]]:
    """Name, architecture and model."""
    for name in WINDOWS:
        yield "period 0", name, further(name, {PATTERN: 0}, layers=12)
        yield "period 3", name, further(name, {PATTERN: 3}, layers=12)
        yield "windows by array", name, further(name, {PATTERN: FLAGS}, layers=12)
    yield "period 3", "llama4", further("llama4", {PATTERN: 3})
    for name in INTERVALS:
        yield "interval 3", name, further(name, {INTERVAL: 3})
        yield "recurrent by array", name, further(name, {RECURRENT: FLAGS})
    for name in DENSE_FIRST:
        for count in (0, 1, SPECS[name].layers):
            yield f"{count} dense first", name, further(name, {DENSE: count})
    for name in PREDICTS:
        yield "predicting", name, predicting(name)
    for name in UNEQUAL:
        heads = {HEADS: [4, 2, 4, 8, 4, 2], KV_HEADS: [2, 1, 2, 4, 1, 2]}
        yield "unequal heads", name, further(name, heads)
        wide = {"feed_forward_length": [128, 64, 128, 192, 32, 96]}
        yield "unequal widths", name, further(name, wide)
    for name in WITH_OUTPUT:
        yield "untied", name, further(name, {}, UNTIED)
    yield "rope factors", "llama", further("llama", {}, FREQUENCIES)
    yield "rope factors", "phi3", further("phi3", {}, *FACTORS)
    yield "rope factors", "minicpm", further("minicpm", {"rope.scaling.type": "longrope"}, *FACTORS)


VARIANTS = {f"{name}: {kind}": (name, spec) for kind, name, spec in _all()}
# One of each kind, for every run of the tests.
SHORT = (
    *("gemma3: period 3", "cohere2moe: windows by array"),
    *("deepseek2: 1 dense first", "glm4moe: predicting", "deci: unequal heads", "llama: untied"),
    "phi3: rope factors",
)
