"""Layout of a hypothetical GGUF with about as many bits a weight as the model has in MLX."""

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


def hypothetical_gguf(mlx: ModelLayout) -> ModelLayout | None:
    """Layout of the GGUF; None where it could not be cut into stages, or stand in for the model."""
    name = OF_MLX.get(mlx.model_type)
    if name is None or mlx.quant not in FILE_TYPES or not mlx.hidden_size:
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
        kv_bytes_per_layer=_cache_bytes(mlx, name),
        context=mlx.context,
        users=mlx.users,
        hidden_bytes=SINGLE * mlx.hidden_size,
        quant=quant,
        max_context=mlx.max_context,
        forbidden_cuts=_forbidden(name, len(sizes), mlx.max_context),
        forbidden_counts=KNOWN[name].total,
        embed_bytes=round(scale * mlx.embed_bytes),
        # A row of the embedding; where it is tied, MLX reads it all, which its layout doesn't show.
        head_active_bytes=mlx.hidden_size if tied else mlx.head_active_bytes - rest,
        parameters=mlx.parameters,
        layer_active_parameters=mlx.layer_active_parameters,
        engine="ggml",
        hidden_size=mlx.hidden_size,
        tail_bytes=lm_head,
        vocabulary=mlx.vocabulary,
    )


def _cache_bytes(mlx: ModelLayout, name: str) -> list[int]:
    """KV bytes of each layer in ggml, where windowed layers have caches of the full context."""
    sizes = list(mlx.kv_bytes_per_layer)
    return [max(sizes)] * len(sizes) if KNOWN[name].window else sizes


def _forbidden(name: str, layers: int, context: int) -> list[int]:
    rule = KNOWN[name]
    if rule.indexer:
        return [cut for cut, chooses in enumerate(choosing(layers, context)) if not chooses]
    if layers in rule.total:
        return list(range(1, layers))
    return [cut for cut in range(1, layers) if rule.interval and cut % rule.interval]
