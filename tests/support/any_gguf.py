"""Tiny random GGUFs of all architectures of llama.cpp: what they have of metadata."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.derived_gguf import Derived, derive, write
from tests.support.tiny_gguf import _random

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, WIDE, EXPERTS, TOKENS = 6, 64, 4, 2, 16, 128, 4, 264

COMMON: dict[str, Any] = {
    "context_length": 4096,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDE,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD,
    "attention.value_length": HEAD,
    "rope.dimension_count": HEAD,
    "rope.freq_base": 10000.0,
    "vocab_size": TOKENS,
}
MOE: dict[str, Any] = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_gating_func": 2,
}
EQUAL = {"attention.head_count_kv": HEADS}
MLA: dict[str, Any] = {
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "rope.dimension_count": 8,
}
INDEXER = {
    "attention.indexer.head_count": 16,  # or many a score is 0, and which is chosen is chance
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
}
# Of keys that llama.cpp asks for.
ASKED: dict[str, Any] = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 4,
    "attention.sliding_window": 16,
    "leading_dense_block_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "logit_scale": 0.5,
    "residual_scale": 0.7,
    "embedding_scale": 2.0,
    "attention.scale": 0.2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "rope.dimension_sections": [4, 2, 2, 0],
    "interleave_moe_layer_step": 1,
    "use_parallel_residual": True,
    "attention.clamp_kqv": 5.0,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "kda.head_dim": 16,
    "kda.gate_lower_bound": -5.0,
    "shortconv.l_cache": 3,
    "wkv.head_size": 16,
    "time_mix_extra_dim": 8,
    "time_decay_extra_dim": 8,
    "attention.decay_lora_rank": 8,
    "attention.iclr_lora_rank": 8,
    "attention.value_residual_mix_lora_rank": 8,
    "attention.gate_lora_rank": 8,
    "embedding_length_per_layer_input": 0,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 3,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0,
    "hyper_connection.low_rank": 8,
    "expert_group_scale": 0.05,
    "experts_per_group": 2,
    "attention.output_group_count": 2,
    "attention.output_lora_rank": 32,
    "attention.compress_rope_freq_base": 10000.0,
    "attention.indexer.block_size": 8,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 2,
    "attn_res.block_size": 2,
    "alpha_n": 0.8,
    "alpha_p": 0.7,
    "beta": 0.5,
    "eps": 0.01,
} | INDEXER


@dataclass(frozen=True)
class Spec:
    """metadata: of a model, beside COMMON. optional, further, later: see derive."""

    layers: int = LAYERS
    metadata: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    later: dict[str, Any] = field(default_factory=dict)


def _hybrid(pattern: str, heads: int = KV_HEADS) -> dict[str, Any]:
    """KV heads by layer: * has attention."""
    return {"attention.head_count_kv": [heads * (kind == "*") for kind in pattern]}


PLAIN = (
    *("llama", "arcee", "bitnet", "chatglm", "command-r", "deci"),
    *("ernie4_5", "exaone", "falcon", "hunyuan-dense", "hunyuan_vl", "hy_v3"),
    *("jais2", "maincoder", "mamba2", "mistral3", "openelm", "pangu-embedded"),
    *("qwen2", "qwen2vl", "qwen3", "qwen3vl", "refact", "seed_oss", "starcoder2"),
    *("codeshell", "gptneox", "internlm2", "jais", "nemotron", "olmo", "orion", "phi2"),
    *("plamo", "qwen", "stablelm", "xverse", "granite", "minicpm", "bloom", "gemma"),
    *("gpt2", "mpt", "starcoder", "glm4", "cogvlm"),
    *("talkie", "baichuan", "gemma3n", "nanbeige", "granitemoe", "smollm3"),
)
WITH_EXPERTS = (
    *("arctic", "deepseek", "grovemoe", "hunyuan-moe", "phimoe", "qwen3moe"),
    *("qwen3vlmoe", "bailingmoe", "bailingmoe2", "dbrx", "minimax-m2"),
    *("qwen2moe", "grok", "glm4moe"),
)
WWF = [True, True, False, True, True, False]

SPECS: dict[str, Spec] = {
    **{name: Spec() for name in PLAIN},
    **{name: Spec(metadata=MOE) for name in WITH_EXPERTS},
    **{name: Spec(metadata=MOE | EQUAL) for name in ("dots1", "olmoe", "deepseek2-ocr")},
    "paddleocr": Spec(metadata={"rope.dimension_sections": [4, 2, 2, 0]}),
    "phi3": Spec(optional=("attn_qkv.weight",)),
    "falcon-h1": Spec(optional=("ssm_norm.weight", "ssm_conv1d.bias")),
    "plm": Spec(metadata={"attention.key_length": 24, "rope.dimension_count": 8} | EQUAL),
    "minicpm3": Spec(metadata={"attention.key_length": 24, "rope.dimension_count": 8} | EQUAL),
    "apertus": Spec(
        metadata={
            "xielu.alpha_n": [0.8] * 6,
            "xielu.alpha_p": [0.7] * 6,
            "xielu.beta": [0.5] * 6,
            "xielu.eps": [0.01] * 6,
        }
    ),
    "mamba": Spec(metadata={"ssm.inner_size": 128}),
    "rwkv6qwen2": Spec(metadata={"token_shift_count": 1}),
    "deepseek2": Spec(metadata=MOE | MLA),
    "mistral4": Spec(metadata=MOE | MLA),
    "deepseek32": Spec(metadata=MOE | MLA | INDEXER),
    "glm-dsa": Spec(
        metadata=MOE | MLA | INDEXER,
        optional=(
            *("indexer.k_norm.weight", "indexer.k_norm.bias", "indexer.proj.weight"),
            *("indexer.attn_k.weight", "indexer.attn_q_b.weight"),
        ),
    ),
    "deepseek4": Spec(
        metadata=MOE
        | {
            "attention.head_count_kv": 1,
            "expert_gating_func": 4,
            "attention.compress_ratios": [0, 4, 128, 4, 128, 4],
            "swiglu_clamp_exp": [10.0] * 6,
            "hash_layer_count": 2,
        }
    ),
    "qwen3next": Spec(12, MOE, optional=("attn_qkv.weight", "attn_gate.weight")),
    "qwen35": Spec(12, optional=("attn_qkv.weight", "attn_gate.weight")),
    "qwen35moe": Spec(12, MOE, optional=("attn_qkv.weight", "attn_gate.weight")),
    "minimax-01": Spec(12, MOE | {"full_attention_interval": 4}),
    "granitehybrid": Spec(
        12, _hybrid("mm*mmm*mmm*m") | {"ssm.inner_size": 128}, ("ssm_conv1d.bias",)
    ),
    "jamba": Spec(12, _hybrid("mm*mmm*mmm*m") | {"ssm.inner_size": 128}),
    "lfm2": Spec(12, _hybrid("mm*mm*m*mm*m")),
    "lfm2moe": Spec(12, _hybrid("mm*mm*m*mm*m") | MOE),
    "nemotron_h": Spec(
        12,
        _hybrid("m-m*-m-m*-m-")
        | {"feed_forward_length": [WIDE * (kind == "-") for kind in "m-m*-m-m*-m-"]},
        ("ssm_conv1d.bias",),
    ),
    "nemotron_h_moe": Spec(
        12,
        _hybrid("m-m*-m-m*-m-")
        | MOE
        | {"expert_shared_feed_forward_length": 32}
        | {"feed_forward_length": [WIDE * (kind == "-") for kind in "m-m*-m-m*-m-"]},
        ("ssm_conv1d.bias",),
    ),
    "bailingmoe3": Spec(12, MOE | MLA | _hybrid("mmm*mmm*mmm*", 1)),
    "kimi-linear": Spec(12, MOE | MLA | _hybrid("mmm*mmm*mmm*", 1)),
    "gemma2": Spec(),
    "gemma3": Spec(metadata={"attention.sliding_window": 16, "rope.freq_base_swa": 1000.0}),
    "gemma4": Spec(12, {"attention.sliding_window_pattern": WWF * 2}),
    "gpt-oss": Spec(metadata=MOE),
    "cohere2": Spec(12),
    "cohere2moe": Spec(12, MOE | {"attention.layer_norm_epsilon": 1e-5}),
    "exaone4": Spec(),
    "exaone-moe": Spec(12, MOE),
    "granite_swa": Spec(metadata={"attention.sliding_window_pattern": WWF}),
    "maple": Spec(
        metadata=MOE | {"attention.sliding_window_pattern": WWF, "swiglu_clamp_exp": [10.0] * 6}
    ),
    "laguna": Spec(12, MOE | {"attention.sliding_window": 16}),
    "hy_v4": Spec(metadata=MOE | MLA | INDEXER | {"attention.indexer.types": [1, 0, 1, 1, 0, 1]}),
    "mellum": Spec(12, MOE | {"attention.sliding_window": 16}),
    "mimo2": Spec(metadata=MOE | {"attention.sliding_window_pattern": WWF}),
    "muse-glimmer": Spec(12),
    "olmo2": Spec(12, {"attention.sliding_window": 16}),
    "plamo3": Spec(16, {"attention.sliding_window": 16}),
    "spark2_5": Spec(metadata={"attention.sliding_window_pattern": WWF}),
    "step35": Spec(metadata=MOE | {"attention.sliding_window_pattern": WWF}),
    "afmoe": Spec(12, MOE | {"attention.sliding_window": 16}),
    "ernie4_5-moe": Spec(metadata=MOE | {"interleave_moe_layer_step": 1}),
    "llama4": Spec(12, MOE | {"interleave_moe_layer_step": 2}),
    "smallthinker": Spec(16, MOE | {"attention.sliding_window": 16}),
    "smollm3": Spec(12),
}


def derived(folder: Path, architecture: str, spec: Spec | None = None) -> Derived:
    """Metadata and tensors of a file of an architecture.

    spec: another than that of SPECS; its keys of None are left out.
    Raises NotDerivedError where llama.cpp takes no such file.
    """
    spec = spec or SPECS[architecture]
    own = COMMON | {"block_count": spec.layers} | spec.metadata
    stated = {key: value for key, value in own.items() if value is not None}
    file = folder / f"{architecture}.derived.gguf"
    return derive(file, architecture, stated, ASKED, spec.optional, spec.further, spec.later)


def save_random(file: Path, made: Derived, seed: int = 0, *, tokenizer: bool = False) -> None:
    rng = np.random.default_rng(seed)
    weights = {name: _weights(name, shape, rng) for name, shape in made.shapes.items()}
    write(file, made, weights, tokenizer)


def with_tokenizer(folder: Path, architecture: str) -> Path:
    """A random file with the tokenizer of tests.support.tiny."""
    file = folder / f"{architecture}.gguf"
    save_random(file, derived(folder, architecture), tokenizer=True)
    return file


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    if "tid2eid" in name:
        return rng.integers(0, EXPERTS, shape, np.int32)
    return _random(name, shape, rng)
