"""Models to measure with: random weights, since only time counts."""

from pathlib import Path
from typing import Any

from tests.tiny import tiny_config, write_model

_SIZES: dict[str, dict[str, int]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 736, "num_attention_heads": 8},
    "125M": {"hidden_size": 768, "intermediate_size": 3488, "num_attention_heads": 12},
}


def write_llama(path: Path, size: str = "10M") -> Path:
    """A float32 llama of 12 layers and 10 or 125 million parameters."""
    return write_model(path, tiny_config("llama") | llama_config(size))


def llama_config(size: str) -> dict[str, Any]:
    """What of its config differs from a tiny one's."""
    sizes = _SIZES[size]
    heads = sizes["num_attention_heads"]
    return sizes | {
        "num_hidden_layers": 12,
        "num_key_value_heads": heads,
        "head_dim": sizes["hidden_size"] // heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
