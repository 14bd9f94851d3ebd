"""Layout of a hypothetical GGUF with about as many bits a weight as the model has in MLX."""

from math import lcm
from typing import Any

from node.ggml.cutting.architectures import KNOWN, OF_MLX
from node.ggml.cutting.kinds import choosing
from unicluster.v1.node_pb2 import ModelLayout

# By MLX's quantization: the ggml type with about as many bits a weight, and the ratio of bytes.
FILE_TYPES = {
    "q2": ("q2_k", 2.625 / 2.5),
    "q3": ("q3_k", 3.4375 / 3.5),
    "q4": ("q4_0", 1.0),
    "q6": ("q6_k", 6.5625 / 6.5),
    "q8": ("q8_0", 1.0),
    "mxfp4-q8": ("mxfp4", 1.0),
    "bfloat16": ("bf16", 1.0),
    "float16": ("f16", 1.0),
    "float32": ("f32", 1.0),
}
SINGLE = 4
# Caches are of a multiple of so many tokens, in both engines.
CELLS = 256
# Of a layer, in "layer_types" of a config.json.
SLIDING = "sliding_attention"


def hypothetical_gguf(mlx: ModelLayout, config: dict[str, Any]) -> ModelLayout | None:
    """Layout of the GGUF; None where it could not be cut into stages, or stand in for the model.

    config: of the model, from which `mlx` was made.
    """
    name, text = OF_MLX.get(mlx.model_type), config.get("text_config") or config
    hidden = int(mlx.hidden_size or text.get("hidden_size") or 0)
    if name is None or mlx.quant not in FILE_TYPES or not hidden:
        return None
    if text.get("hidden_size_per_layer_input"):
        return None
    quant, scale = FILE_TYPES[mlx.quant]
    rest = mlx.head_bytes - mlx.embed_bytes
    # Without a lm_head of its own the embedding is one, and is needed at both ends of a ring.
    tied = rest < mlx.embed_bytes // 2
    lm_head = round(scale * (rest + mlx.embed_bytes if tied else rest))
    sizes, active = (
        [round(scale * size) for size in row] for row in (mlx.layer_bytes, mlx.layer_active_bytes)
    )
    sizes[-1] += lm_head
    active[-1] += lm_head
    return ModelLayout(
        model_type=name,
        layer_bytes=sizes,
        layer_active_bytes=active,
        head_bytes=round(scale * mlx.embed_bytes),
        kv_bytes_per_layer=_cache_bytes(mlx, text),
        context=mlx.context,
        users=mlx.users,
        hidden_bytes=SINGLE * hidden,
        quant=quant,
        max_context=mlx.max_context,
        forbidden_cuts=_forbidden(name, len(sizes), mlx.max_context, text),
        forbidden_counts=KNOWN[name].total,
        embed_bytes=round(scale * mlx.embed_bytes),
        # A row of the embedding; where it is tied, MLX reads it all, which its layout doesn't show.
        head_active_bytes=hidden if tied else mlx.head_active_bytes - rest,
        parameters=mlx.parameters,
        layer_active_parameters=mlx.layer_active_parameters,
        engine="ggml",
        hidden_size=hidden,
        tail_bytes=lm_head,
        vocabulary=mlx.vocabulary,
        recurrent=mlx.recurrent,
        window=mlx.window,
    )


def _cache_bytes(mlx: ModelLayout, text: dict[str, Any]) -> list[int]:
    """KV bytes of each layer in ggml, where windowed layers have caches of the full context."""
    window = int(text.get("sliding_window") or 0)
    if not 0 < window < mlx.context:
        return list(mlx.kv_bytes_per_layer)
    sizes, kinds = list(mlx.kv_bytes_per_layer), text.get("layer_types") or []
    windowed = [kind == SLIDING for kind in kinds] or [size < max(sizes) for size in sizes]
    cells = -(-mlx.context // CELLS) * CELLS
    return [
        size * cells // window if flag else size for size, flag in zip(sizes, windowed, strict=True)
    ]


def _forbidden(name: str, layers: int, context: int, text: dict[str, Any]) -> list[int]:
    rule = KNOWN[name]
    if rule.indexer:
        return [cut for cut, chooses in enumerate(choosing(layers, context)) if not chooses]
    if layers in rule.total:
        return list(range(1, layers))
    step = lcm(*(n if isinstance(n, int) else int(text.get(n) or 1) for n in rule.every))
    step = lcm(step, rule.interval or 1)
    # Each stage needs a windowed layer, and one that attends to everything.
    kinds = text.get("layer_types") if rule.distinct else None
    return [
        cut
        for cut in range(1, layers)
        if cut % step or (kinds is not None and kinds[cut - 1] == SLIDING)
    ]
