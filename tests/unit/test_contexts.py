"""The context that a model may be asked for, with scaled rotary positions: once."""

from typing import Any

import pytest

from node.engines.mlx_layout import context_limit
from unicluster.checkpoints.context import longest_context

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, tuple[int, Any, int]] = {
    "no scaling": (32768, None, 32768),
    "unknown": (0, None, 0),
    "yarn": (32768, YARN, 131072),
    "yarn of a longer context": (40960, YARN, 131072),
    "yarn that is stated": (131072, YARN, 131072),
    "yarn by its newer name": (32768, {**YARN, "type": None, "rope_type": "yarn"}, 131072),
    "yarn of the stated context": (32768, {"type": "yarn", "factor": 2}, 65536),
    "deepseek": (
        163840,
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        163840,
    ),
    "llama-3.1": (
        131072,
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        131072,
    ),
    "phi": (131072, {"type": "longrope", "long_factor": [1.0], "factor": 32}, 131072),
    "linear": (4096, {"type": "linear", "factor": 4.0}, 16384),
    "dynamic": (4096, {"rope_type": "dynamic", "factor": 2.0}, 8192),
    "several axes": (32768, {"type": "mrope", "mrope_section": [16, 24, 24]}, 32768),
    "none at all": (4096, {"rope_type": "default", "rope_theta": 1e4}, 4096),
    "by kinds of layers": (
        32768,
        {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
        131072,
    ),
    "no factor": (4096, {"type": "yarn"}, 4096),
    "a factor that is none": (4096, {"type": "linear", "factor": "4"}, 4096),
    "an endless factor": (4096, {"type": "linear", "factor": float("inf")}, 4096),
    "a factor that shrinks": (4096, {"type": "linear", "factor": 0.5}, 4096),
    "a type that is none": (4096, {"type": ["yarn"], "factor": 4.0}, 4096),
    "nonsense": (4096, "yarn", 4096),
}


@pytest.mark.parametrize(("stated", "scaling", "longest"), CASES.values(), ids=CASES)
def test_scaled_positions_extend_the_context_once(stated: int, scaling: Any, longest: int) -> None:
    assert longest_context(stated, scaling) == longest


def test_a_configuration_has_its_scaling_in_one_of_several_places() -> None:
    short = {"max_position_embeddings": 32768}

    assert context_limit(short | {"rope_scaling": YARN}) == 131072
    assert context_limit(short | {"rope_scaling": None, "rope_parameters": YARN}) == 131072
    assert context_limit({"text_config": short | {"rope_scaling": YARN}}) == 131072
    linear = {"rope_type": "linear", "factor": 8.0}
    gemma = {"model_type": "gemma3_text", "max_position_embeddings": 131072}
    assert context_limit({"text_config": gemma | {"rope_scaling": linear}}) == 131072
