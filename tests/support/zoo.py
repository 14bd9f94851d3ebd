"""A tiny random model of every model module of the installed mlx-lm.

Most configurations follow from the names of a module's own ModelArgs: the names mean the same
nearly everywhere. What is special to a module stands in OVERRIDES. A module that a new mlx-lm
brings is built from COMMON alone and needs an entry only if that does not do.
"""

import copy
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import models

LAYERS = 4
WINDOW = 8
VOCAB = 96
MOST_PARAMETERS = 8_000_000

_SLIDING_FIRST = ["sliding_attention", "full_attention"]

COMMON: dict[str, Any] = {
    # sizes
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "layer_types": _SLIDING_FIRST * (LAYERS // 2),
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # state spaces and linear attention
    "conv_kernel": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "use_conv_bias": True,
    "n_groups": 1,
    "conv_bias": True,
    "conv_L_cache": 3,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_group_size": 2,
    "group_norm_size": 2,
    # scalings
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "scale_depth": 1.0,
    "scale_emb": 1.0,
    "dim_model_base": 64,
    "query_pre_attn_scalar": 16,
    # the names of GPT-2 and its kin
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "n_ctx": 256,
    "n_inner": 96,
}

_KV_SHARED = ["sliding_attention", "full_attention"] * 3
_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
_LFM2 = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_dim": 64,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "block_ff_dim": 96,
}
_MAMBA = {
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_chunk_size": 8,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "num_layers": LAYERS,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "routed_scaling_factor": 1.5,
}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": _KV_SHARED,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "global_head_dim": 32,
    "rope_parameters": None,
}
_GEMMA4_LARGE = _GEMMA4 | {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "top_k_experts": 2,
}

# By module. What follows a colon names a further configuration of it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 5,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_moe": {"partial_rotary_factor": 1.0},
    "dbrx": {
        "d_model": 64,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "n_layers": LAYERS,
        "n_heads": 4,
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0}, "topk_method": "greedy"},
    "deepseek_v41": {"head_dim": 32, "o_groups": 2, "o_lora_rank": 16},
    "deepseek_v41: shared index": {
        "head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_head_dim": 32,
        "compress_ratios": [2] * LAYERS,
        "kv_source_layer_ids": [0, 2],
        "index_source_layer_ids": [0, 2],
        "candidate_source_layer_id": 0,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "exaone": {"num_layers": LAYERS},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * 2},
    "falcon_h1": _MAMBA,
    "gemma3": {"model_type": "gemma3_text"},
    "gemma3n": {
        "num_hidden_layers": 6,
        "layer_types": _KV_SHARED,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        "altup_num_inputs": 3,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": _GEMMA4,
    "gemma4: large": _GEMMA4_LARGE,
    "gemma4_text": _GEMMA4,
    "gemma4_text: large": _GEMMA4_LARGE,
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "gptj": {"rotary_dim": 8},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": _MAMBA
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 8,
    },
    "kimi_k3": {"linear_attn_config": _KDA, "num_experts": 4, "attn_res_block_size": 2},
    "kimi_linear": {
        "linear_attn_config": _KDA,
        "model_max_length": 256,
    },
    "laguna": {"rope_parameters": {}},
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "use_expert_bias": True},
    "lille-130m": {"block_size": 256, "n_kv_heads": 2},
    "llama4": {
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT | {"ngram_vocab_size_ratio": 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {
        "num_heads": 4,
        "intermediate_size": 64,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": 4,
    },
    "mellum": {
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in _SLIDING_FIRST
        }
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0] * 2,
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "dense_intermediate_size": 96,
        "layer_types": None,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
    "muse_spark": {
        "post_norm_eps": 1e-8,
        "layer_rope_theta": [10000.0, 0.0] * 2,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.5,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nanbeige: loops": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {
        "layer_types": None,
        "hybrid_override_pattern": list("M*-EM*"),
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        "num_transformer_layers": LAYERS,
        "model_dim": 64,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0] * LAYERS,
    },
    "phi3small": {
        "vocab_size": 100352,  # it writes to fixed places near the end of the vocabulary
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
        "original_max_position_embeddings": 64,
    },
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": LAYERS,
        "rotary_dim": 8,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 16,
        "attention_window_size": WINDOW,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
    },
    "plamo3": {"window_size": WINDOW},
    "prism_hadamard_qwen35": {
        "num_experts": 0,
        "intermediate_size": 128,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": False, "dtype": "float16", "block": 0}
            for path in ("model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj")
        ],
    },
    "qwen": {"kv_channels": 16},
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in _SLIDING_FIRST
        }
    },
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2,3",
    },
}


def names() -> list[str]:
    """Every configuration: the modules of mlx-lm, and further ones after a colon."""
    modules = {module.name for module in pkgutil.iter_modules(models.__path__)}
    return sorted(modules | OVERRIDES.keys())


def is_model(name: str) -> bool:
    """False for the modules that models share."""
    try:
        return hasattr(_module(name), "Model")
    except SystemExit:
        return True  # it lacks a package, and says so when built


def config(name: str) -> dict[str, Any]:
    """The config.json of the tiny model.

    Modules that wrap another keep its fields under text_config; a superfluous one does no harm.
    """
    module = name.partition(":")[0]
    fields = {"model_type": module} | COMMON | OVERRIDES.get(name, {})
    return copy.deepcopy(fields | {"model_type": module, "text_config": fields})


def build(name: str, dtype: mx.Dtype = mx.float32, seed: int = 0) -> nn.Module:
    """The tiny model with random weights, the same in each call, not yet evaluated.

    Weights are scaled so that every layer changes the hidden state, else a wrong cut would not
    show. Raises whatever mlx-lm raises.
    """
    code = _module(name)
    mx.random.seed(seed)  # some modules start with random values
    model = code.Model(code.ModelArgs.from_dict(config(name)))
    shapes = tree_flatten(model.parameters())
    size = sum(value.size for _, value in shapes)
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name} has {size} parameters: give it a tiny configuration")
    rng = np.random.default_rng(seed)
    weights = [(key, _random(value, rng, dtype)) for key, value in shapes]
    model.update(tree_unflatten(weights))
    return model


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name.partition(':')[0]}")


def _random(value: mx.array, rng: np.random.Generator, dtype: mx.Dtype) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    noise = mx.array(rng.standard_normal(value.shape, dtype=np.float32))
    if value.ndim > 1:
        return (noise * (value.shape[-1] ** -0.5)).astype(dtype)
    return (value + 0.1 * noise).astype(dtype)
