"""What a model weighs, layer by layer, from its own mlx-lm class over lazy weights.

Run as a program it reads one InspectRequest from standard input and writes a ModelLayout to
standard output, so that an agent never holds MLX itself.
"""

import contextlib
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from node import cache
from node.crossing import forbidden_cuts, token_bytes
from node.survey import Survey, survey
from node.trace import Trace
from node.weights import LazyModel, nbytes
from unicluster.checkpoint import Checkpoint
from unicluster.errors import InputError, UniclusterError
from unicluster.safetensors import read_header
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout, WeightFile

DEFAULT_CONTEXT = 8192


def inspect(
    checkpoint: Checkpoint, quant: str = "", context: int = 0, users: int = 1
) -> ModelLayout:
    """The exact bytes of a model as this machine would load it; nothing is read or computed.

    Of the checkpoint only the description need be here. Raises InputError for a bad directory or
    an impossible context.
    """
    surveyed = survey(checkpoint.root, quant)
    lazy, found = surveyed.lazy, surveyed.found
    limit = context_limit(lazy.config)
    if context and limit and context > limit:
        raise InputError(
            f"context: {context} tokens, and {checkpoint.manifest.model} is made for at most "
            f"{limit}"
        )
    context = context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    layer_bytes = [nbytes(layer) for layer in found.layers]
    return ModelLayout(
        model_type=lazy.model_type,
        layer_bytes=layer_bytes,
        layer_active_bytes=[_active_bytes(layer, lazy.config) for layer in found.layers],
        head_bytes=nbytes(lazy.model) - sum(layer_bytes),
        kv_bytes_per_layer=[users * size for size in _kv_bytes(lazy, found, context)],
        context=context,
        users=users,
        hidden_bytes=token_bytes(found),
        quant=lazy.quant,
        max_context=limit,
        forbidden_cuts=sorted(forbidden_cuts(found)),
        revision=checkpoint.manifest.revision,
        files=[_file(checkpoint, name, surveyed) for name in checkpoint.manifest.weights],
    )


def _file(checkpoint: Checkpoint, name: str, surveyed: Survey) -> WeightFile:
    tensors = read_header(checkpoint.root / name).tensors.keys()
    outside = frozenset[str]().union(*surveyed.outside.values())
    return WeightFile(
        name=name,
        size=checkpoint.manifest.files[name].size,
        layers=[i for i, layer in enumerate(surveyed.layers) if layer & tensors],
        outside=bool(outside & tensors),
    )


def context_limit(config: dict[str, Any]) -> int:
    """The most tokens the model is made for; 0 when its configuration doesn't say."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    return int(limit or 0)


def _active_bytes(layer: nn.Module, config: dict[str, Any]) -> int:
    """Bytes read for one token: of a mixture of experts, only those chosen."""
    text = config.get("text_config") or config
    chosen = text.get("num_experts_per_tok") or text.get("num_experts_per_token") or 1
    total = nbytes(layer)
    for module in layer.modules():
        if hasattr(module, "num_experts") and "weight" in module:
            experts = module.weight.shape[0]
            total -= nbytes(module) * (experts - min(chosen, experts)) // experts
    return total


def _kv_bytes(lazy: LazyModel, found: Trace, context: int) -> list[int]:
    """Cache bytes of each layer for one sequence of `context` tokens.

    The caches are filled lazily, a prompt and then one token, which makes windowed caches
    shrink to their window; only shapes are computed.
    """
    cache = make_prompt_cache(lazy.model)
    for tokens in (context - 1, 1):
        if tokens:
            lazy.model(mx.zeros((1, tokens), mx.int32), cache=cache)
    return [sum(cache[index].nbytes for index in entries) for entries in found.cache_entries]


def main() -> None:
    request = InspectRequest.FromString(sys.stdin.buffer.read())
    try:
        checkpoint = cache.find(request.model, request.revision)
        if checkpoint is None:
            raise InputError(f"{request.model}: no longer on this machine")
        with contextlib.redirect_stdout(sys.stderr):  # libraries print
            layout = inspect(checkpoint, request.quant, request.context, request.users or 1)
    except UniclusterError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    sys.stdout.buffer.write(layout.SerializeToString())


if __name__ == "__main__":
    main()
