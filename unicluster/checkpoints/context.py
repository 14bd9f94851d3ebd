"""The longest context of a model, with what scaled rotary positions add to it."""

from typing import Any

# Of these the stated context is the long one already, or positions are not stretched at all.
STATED = {"default", "none", "llama3", "longrope", "su", "mrope", "proportional"}
# No model's is stretched by as much.
MOST = 1 << 20


def longest_context(stated: int, scaling: Any) -> int:
    """Tokens of context that a model is made for; 0 where it doesn't say.

    Args:
        stated: max_position_embeddings, or a GGUF's context_length.
        scaling: the model's rope_scaling: its `rope_type` or `type`, `factor`, and
            `original_max_position_embeddings`, the context before scaling, or such by kinds of
            layers. What makes no sense in it is ignored.

    A model that states the scaled context already (llama-3.1, DeepSeek) gets it once.
    """
    if not isinstance(scaling, dict):
        return stated
    longest = max((longest_context(stated, each) for each in scaling.values()), default=stated)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(kind, str) or kind in STATED or not isinstance(factor, int | float):
        return longest
    base = original if isinstance(original, int) and original > 0 else stated
    return max(longest, int(base * factor)) if factor < MOST else longest
