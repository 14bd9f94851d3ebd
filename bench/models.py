"""Models to measure with: random weights, since only time counts."""

from pathlib import Path

from tests.tiny import tiny_config, write_model


def write_llama(path: Path) -> Path:
    """A float32 llama of 12 layers and 10 million parameters."""
    size = {
        "num_hidden_layers": 12,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    }
    return write_model(path, tiny_config("llama") | size)
