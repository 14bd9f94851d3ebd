"""Tiny random GGUFs, one for each architecture that can be cut, made with the `gguf` package."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from tokenizers import pre_tokenizers

from tests.support.tiny import CHAT_TEMPLATE, END, EOS, MARKS, START, VOCAB, tiny_config

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, WIDE, EXPERTS = 6, 64, 4, 2, 16, 128, 4

Shapes = dict[str, tuple[int, ...]]


def _attention(biases: bool = False, norms: bool = False, out: bool = True) -> Shapes:
    shapes: Shapes = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HEADS * HEAD, HIDDEN),
        "attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
        "attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
    }
    if out:
        shapes["attn_output.weight"] = (HIDDEN, HEADS * HEAD)
    if biases:
        shapes |= {"attn_q.bias": (HEADS * HEAD,)}
        shapes |= {f"attn_{each}.bias": (KV_HEADS * HEAD,) for each in "kv"}
    if norms:
        shapes |= {f"attn_{each}_norm.weight": (HEAD,) for each in "qk"}
    return shapes


def _dense(norm: str = "ffn_norm.weight") -> Shapes:
    return {
        norm: (HIDDEN,),
        "ffn_gate.weight": (WIDE, HIDDEN),
        "ffn_up.weight": (WIDE, HIDDEN),
        "ffn_down.weight": (HIDDEN, WIDE),
    }


def _experts(norm: str = "ffn_norm.weight", shared: bool = False, biases: bool = False) -> Shapes:
    wide = 32
    shapes: Shapes = {
        norm: (HIDDEN,),
        "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
        "ffn_gate_exps.weight": (EXPERTS, wide, HIDDEN),
        "ffn_up_exps.weight": (EXPERTS, wide, HIDDEN),
        "ffn_down_exps.weight": (EXPERTS, HIDDEN, wide),
    }
    if shared:
        shapes |= {
            "ffn_gate_shexp.weight": (wide, HIDDEN),
            "ffn_up_shexp.weight": (wide, HIDDEN),
            "ffn_down_shexp.weight": (HIDDEN, wide),
        }
    if biases:
        shapes |= {
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, wide),
            "ffn_up_exps.bias": (EXPERTS, wide),
            "ffn_down_exps.bias": (EXPERTS, HIDDEN),
        }
    return shapes


def _gemma3(layer: int) -> Shapes:
    posts = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
    return _attention(norms=True) | _dense() | posts


def _deepseek2(layer: int) -> Shapes:
    nope, rope, rank = 16, 8, 32
    return {
        "attn_norm.weight": (HIDDEN,),
        "attn_q_a.weight": (rank, HIDDEN),
        "attn_q_a_norm.weight": (rank,),
        "attn_q_b.weight": (HEADS * (nope + rope), rank),
        "attn_kv_a_mqa.weight": (rank + rope, HIDDEN),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (HEADS, rank, nope),
        "attn_v_b.weight": (HEADS, HEAD, rank),
        "attn_output.weight": (HIDDEN, HEADS * HEAD),
    } | (_experts(shared=True) | {"exp_probs_b.bias": (EXPERTS,)} if layer >= 2 else _dense())


def _chooses(layer: int) -> Shapes:
    """Further tensors of a layer of deepseek2, which choose the tokens that it attends to."""
    rank, heads, size = 32, 16, 64
    return {
        "indexer.k_norm.weight": (size,),
        "indexer.k_norm.bias": (size,),
        "indexer.proj.weight": (heads, HIDDEN),
        "indexer.attn_k.weight": (size, HIDDEN),
        "indexer.attn_q_b.weight": (heads * size, rank),
    }


def _glm4moe(layer: int) -> Shapes:
    norm = "post_attention_norm.weight"
    moe = _experts(norm, shared=True) | {"exp_probs_b.bias": (EXPERTS,)}
    return _attention(biases=True, norms=True) | (moe if layer >= 1 else _dense(norm))


def _gpt_oss(layer: int) -> Shapes:
    rest = {"attn_output.bias": (HIDDEN,), "attn_sinks.weight": (HEADS,)}
    experts = _experts("post_attention_norm.weight", biases=True)
    return _attention(biases=True) | rest | experts


def _qwen3next(layer: int) -> Shapes:
    norm = "post_attention_norm.weight"
    shared = {"ffn_gate_inp_shexp.weight": (HIDDEN,)}
    experts = _experts(norm, shared=True) | shared
    if (layer + 1) % 4 == 0:
        attention = _attention(norms=True) | {"attn_q.weight": (2 * HEADS * HEAD, HIDDEN)}
        return attention | experts
    size, keys, values = 16, 2, 4
    return {
        "attn_norm.weight": (HIDDEN,),
        "attn_qkv.weight": (size * (2 * keys + values), HIDDEN),
        "attn_gate.weight": (size * values, HIDDEN),
        "ssm_conv1d.weight": (size * (2 * keys + values), 4),
        "ssm_dt.bias": (values,),
        "ssm_a": (values,),
        "ssm_ba.weight": (2 * values, HIDDEN),
        "ssm_norm.weight": (size,),
        "ssm_out.weight": (HIDDEN, size * values),
    } | experts


_MLA: dict[str, Any] = {
    "leading_dense_block_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "rope.dimension_count": 8,
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
_INDEXER = {
    "attention.indexer.head_count": 16,  # or many a score is 0, and which is chosen is chance
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
}

# The tensors of each layer, and the metadata beyond that of all.
ARCHITECTURES: dict[str, tuple[Callable[[int], Shapes], dict[str, Any]]] = {
    "llama": (lambda layer: _attention() | _dense(), {}),
    "qwen2": (lambda layer: _attention(biases=True) | _dense(), {}),
    "qwen2moe": (
        lambda layer: (
            _attention(biases=True)
            | _experts(shared=True)
            | {"ffn_gate_inp_shexp.weight": (HIDDEN,)}
        ),
        {
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32,
        },
    ),
    "qwen3": (lambda layer: _attention(norms=True) | _dense(), {}),
    "qwen3moe": (
        lambda layer: _attention(norms=True) | _experts(),
        {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma3": (_gemma3, {"attention.sliding_window": 16, "rope.freq_base_swa": 1000.0}),
    "deepseek2": (
        _deepseek2,
        _MLA,
    ),
    "deepseek32": (lambda layer: _deepseek2(layer) | _chooses(layer), _MLA | _INDEXER),
    # A layer whose type is 0 attends to what the one before it chose.
    "glm-dsa": (
        lambda layer: _deepseek2(layer) | (_chooses(layer) if layer != 3 else {}),
        _MLA | _INDEXER | {"attention.indexer.types": [1, 1, 1, 0, 1, 1]},
    ),
    "glm4moe": (
        _glm4moe,
        {
            "leading_dense_block_count": 1,
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
    ),
    "gpt-oss": (
        _gpt_oss,
        {
            "attention.sliding_window": 16,
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        },
    ),
    "qwen3next": (
        _qwen3next,
        {
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 64,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 4,
            "ssm.group_count": 2,
            "rope.dimension_count": 8,
        },
    ),
}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    layers: int = LAYERS,
    seed: int = 0,
    parts: int = 1,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """A GGUF of hidden size 64, in float32, with a tokenizer; `metadata` is of the architecture.

    With more `parts` it is split; the path is that of the first, in which there are no tensors.
    """
    shapes, own = ARCHITECTURES[architecture]
    tied = architecture in ("gemma3", "qwen2")
    outside: Shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        outside["output.weight"] = (VOCAB, HIDDEN)
    named = outside | {
        f"blk.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in shapes(layer).items()
    }
    rng = np.random.default_rng(seed)
    weights = {name: _random(name, shape, rng) for name, shape in named.items()}
    own = own | {"block_count": layers} | (metadata or {})
    return save(file, architecture, own, weights, parts)


def save(
    file: Path, architecture: str, own: dict[str, Any], weights: dict[str, Any], parts: int = 1
) -> Path:
    """Writes weights with the metadata of a tiny model; `own` is added to or replaces it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    most = -(-len(weights) // (parts - 1)) if parts > 1 else 0
    writer = gguf.GGUFWriter(
        str(file), architecture, split_max_tensors=most, small_first_shard=parts > 1
    )
    common: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10000.0,
    }
    for key, value in (common | own).items():
        _add(writer, f"{architecture}.{key}", value)
    add_tokenizer(writer)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if parts == 1 else file.with_name(f"{file.stem}-00001-of-{parts:05}.gguf")


def from_checkpoint(path: Path, file: Path) -> Path:
    """Writes the llama in `path`, a checkpoint of tests.support.tiny, as a GGUF."""
    stored: Any = mx.load(str(path / "model.safetensors"))
    arrays = {name: np.array(array) for name, array in stored.items()}
    weights = {
        "token_embd.weight": arrays["model.embed_tokens.weight"],
        "output_norm.weight": arrays["model.norm.weight"],
        "output.weight": arrays["lm_head.weight"],
    }
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(int(tiny_config("llama")["num_hidden_layers"])):
        for theirs, ours in names.items():
            array = arrays[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                array = _interleaved(array, HEADS if ours == "attn_q" else KV_HEADS)
            weights[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(array)
    return save(file, "llama", {}, weights)


def _interleaved(array: Any, heads: int) -> Any:
    """Rows of a head in the order in which llama.cpp rotates them: pairs side by side."""
    rows, columns = array.shape
    halves = array.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.abs(noise) - 0.1
    if name.endswith("norm.weight"):
        return (1 + 0.1 * noise).astype(np.float32)
    if len(shape) == 1:
        return (0.1 * noise).astype(np.float32)
    if name == "token_embd.weight":
        return (0.1 * noise).astype(np.float32)
    return (noise * (2 / math.sqrt(shape[-1]))).astype(np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Tokenizer of tests.support.tiny: token i < 256 is byte i; then END, START and six more."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    above = iter(sorted(c for c in alphabet if ord(c) > 255))
    tokens = [chr(b) if chr(b) in alphabet else next(above) for b in range(256)]
    tokens += [END, START, *MARKS, "<|extra_4|>", "\u0120t"]
    types = [1] * 256 + [3, 3, 4, 4, 4, 4, 3, 1]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["\u0120 t"])
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(EOS + 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
