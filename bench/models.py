"""Models to measure with: random weights, since only time counts.

python -m bench.models DIRECTORY [--size 10M|125M] [--kind llama|qwen2]
"""

import argparse
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_config, write_model

_SIZES: dict[str, dict[str, int]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 736, "num_attention_heads": 8},
    "125M": {"hidden_size": 768, "intermediate_size": 3488, "num_attention_heads": 12},
}


def write_llama(path: Path, size: str = "10M", kind: str = "llama") -> Path:
    """A float32 model of 12 layers and 10 or 125 million parameters.

    A qwen2 is much the same as a llama, and has mlx-lm's own pipeline, which llamas have not.
    """
    return write_model(path, tiny_config("llama") | llama_config(size) | {"model_type": kind})


def llama_config(size: str) -> dict[str, Any]:
    """Settings by which its config differs from a tiny one's."""
    sizes = _SIZES[size]
    heads = sizes["num_attention_heads"]
    return sizes | {
        "num_hidden_layers": 12,
        "num_key_value_heads": heads,
        "head_dim": sizes["hidden_size"] // heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a model of random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=_SIZES, default="10M")
    parser.add_argument("--kind", choices=("llama", "qwen2"), default="llama")
    options = parser.parse_args()
    write_llama(options.directory, options.size, options.kind)


if __name__ == "__main__":
    main()
