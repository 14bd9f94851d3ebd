"""Tiny random models, written to disk as real checkpoints that `mlx_lm.load` opens."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from node.mlx.compat import model_classes

ARCHITECTURES = ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "gemma3")
END, START = "<|end|>", "<|start|>"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EOS = 256
VOCAB = 264

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": EOS,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
    },
}


def tiny_config(model_type: str) -> dict[str, Any]:
    """The config.json of a model of one of ARCHITECTURES: 6 layers, hidden size 64."""
    if model_type == "gemma3":
        text = tiny_config("gemma3_text")
        text["tie_word_embeddings"] = True
        return {"model_type": "gemma3", "vocab_size": VOCAB, "eos_token_id": EOS} | {
            "text_config": text
        }
    return {"model_type": model_type} | _COMMON | _EXTRA[model_type]


def write_model(
    path: Path, config: dict[str, Any], seed: int = 0, *, shards: int = 1, marks: bool = False
) -> Path:
    """Writes config, float32 weights and tokenizer to `path` and returns it.

    `marks` gives the tokenizer tokens for reasoning and tool calls. Weights are scaled so
    that each layer changes the hidden state as much as the embedding does: else a greedy
    answer would repeat one token.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    _write_weights(path, _random_weights(config, seed), shards)
    write_tokenizer(path, marks=marks)
    return path


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, mx.array]:
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    rng = np.random.default_rng(seed)
    shapes: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {}
    for name, value in shapes.items():
        if config["model_type"] == "gemma3" and "lm_head" in name:
            continue  # real checkpoints tie it to the embedding
        noise = rng.standard_normal(value.shape, dtype=np.float32)
        if value.ndim == 1:
            weights[name] = value + 0.1 * mx.array(noise)
        elif "embed_tokens" in name:
            weights[name] = mx.array(0.1 * noise)
        else:
            weights[name] = mx.array(noise * (2 / math.sqrt(value.shape[-1])))
    return weights


def _write_weights(path: Path, weights: dict[str, mx.array], shards: int) -> None:
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
        return
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        mx.save_safetensors(str(path / file), part, {"format": "mlx"})
        index |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )


def write_tokenizer(path: Path, *, marks: bool = False) -> None:
    """Token i is byte i for i < 256; then come `END` (also EOS), `START` and six more."""
    # Printable bytes stand for themselves, the others for what lies above, in order.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    above = iter(sorted(c for c in alphabet if ord(c) > 255))
    vocab = {chr(b) if chr(b) in alphabet else next(above): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    extras = [f"<|extra_{i}|>" for i in range(6)]
    if marks:
        extras[:4] = MARKS
    for token in (END, START, *extras):
        tokenizer.add_tokens([AddedToken(token, special=token not in MARKS, normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if marks:
        settings["tool_parser_type"] = "json_tools"
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
