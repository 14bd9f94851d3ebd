"""Bytes of a model, layer by layer, from its mlx-lm class over lazy weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.compat import direct_arrays
from node.mlx.compat_caches import add_empty_tokens, is_recurrent, leaves, window
from node.mlx.crossing import forbidden_cuts, hidden_size, lm_head_modules, token_bytes
from node.mlx.dataflow import Dataflow, watched
from node.mlx.kv_quant import UnquantizableError, check_quantizable, quantize
from node.mlx.lazy import nbytes
from node.mlx.survey import Survey, survey
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.context import longest_context
from unicluster.checkpoints.safetensors import read_header
from unicluster.errors import InputError, in_one_line
from unicluster.v1.node_pb2 import ModelLayout, WeightFile

DEFAULT_CONTEXT = 8192


def inspect(
    checkpoint: Checkpoint, quant: str = "", context: int = 0, users: int = 1, kv_bits: int = 0
) -> ModelLayout:
    """The exact bytes of a model as this machine would load it; nothing is read or computed.

    Only the checkpoint's description has to be here. `kv_bits`: 4 or 8 to quantize KV caches.
    Raises InputError for a bad directory, an impossible context, or caches that can't be
    quantized.
    """
    surveyed = survey(checkpoint.root, quant)
    lazy, manifest = surveyed.lazy, checkpoint.manifest
    layout = layout_of(
        lazy.model,
        surveyed.dataflow,
        lazy.config,
        lazy.quant,
        manifest.model,
        context,
        users,
        kv_bits,
    )
    layout.revision = manifest.revision
    layout.files.extend(_file(checkpoint, name, surveyed) for name in manifest.weights)
    return layout


def layout_of(
    model: nn.Module,
    found: Dataflow,
    config: dict[str, Any],
    quant: str,
    name: str,
    context: int,
    users: int,
    kv_bits: int = 0,
) -> ModelLayout:
    """Bytes of a lazy model that is already built, which messages call `name`."""
    limit = context_limit(config)
    if context and limit and context > limit:
        raise InputError(f"context: {context} tokens, and {name} is made for at most {limit}")
    context = context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    model_type = str(config["model_type"])
    try:
        step = _decode_step(model, found, context, kv_bits)
    except UnquantizableError as error:
        raise InputError(f"--kv-bits {kv_bits}: {name} {error}") from error
    layer_bytes = [nbytes(layer) for layer in found.layers]
    head_bytes = nbytes(model) - sum(layer_bytes)
    return ModelLayout(
        model_type=model_type,
        layer_bytes=layer_bytes,
        layer_active_bytes=[_active(layer, nbytes, step) for layer in found.layers],
        head_bytes=head_bytes,
        kv_bytes_per_layer=[users * size for size in step.kv_bytes],
        context=context,
        users=users,
        hidden_bytes=token_bytes(found),
        quant=quant,
        max_context=limit,
        forbidden_cuts=sorted(forbidden_cuts(found)),
        embed_bytes=sum(nbytes(embedding.module) for embedding in found.embeddings),
        head_active_bytes=head_bytes - _unread(model, found, step.vocabulary),
        parameters=parameters(model),
        layer_active_parameters=[_active(layer, parameters, step) for layer in found.layers],
        hidden_size=hidden_size(found),
        finish_bytes=_finish_bytes(model, found),
        vocabulary=step.vocabulary,
        recurrent=step.recurrent,
        window=step.window,
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
    """Maximum context of the model, in tokens; 0 when its configuration doesn't say."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    # gemma-3 states the scaled context, and not what it was.
    scaled = not str(text.get("model_type", "")).startswith("gemma3")
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    return longest_context(int(limit or 0), scaling if scaled else None)


def _finish_bytes(model: nn.Module, found: Dataflow) -> int:
    """Bytes of final norm and lm_head; 0 where they alone can't make logits of a hidden state."""
    paths = lm_head_modules(found) or ()
    return sum(nbytes(module) for path, module in model.named_modules() if path in paths)


def parameters(module: nn.Module) -> int:
    """Number of parameters of a module, whatever their bits."""
    count = 0
    for part in module.modules():
        packed = 32 // part.bits if "scales" in part else 1
        for name, value in direct_arrays(part):
            if not name.startswith("_") and name not in ("scales", "biases"):
                count += value.size * packed if name == "weight" else value.size
    return count


@dataclass(frozen=True)
class _Step:
    """One token at the full context: KV bytes by layer, logits, and experts chosen by module."""

    kv_bytes: list[int]
    vocabulary: int
    chosen: dict[int, int]
    recurrent: bool
    window: int


def _decode_step(model: nn.Module, found: Dataflow, context: int, kv_bits: int) -> _Step:
    """Fills the caches lazily with a prompt and then one token; only shapes are computed.

    The one token makes windowed caches shrink to their window. A recurrent layer's graph is as
    deep as its prompt is long, and its state as big after one token: there the prompt is short,
    and the KV of the rest is written to the attention layers' caches directly.
    """
    chosen: dict[int, int] = {}

    def watch(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        chosen[id(module)] = args[1].size if len(args) > 1 else module.num_experts
        return call(*args, **kwargs)

    cache = make_prompt_cache(model)
    recurrent = any(map(is_recurrent, leaves(cache)))
    prompt = min(context - 1, 1) if recurrent else context - 1
    if prompt:
        model(mx.zeros((1, prompt), mx.int32), cache=cache)
    if 0 < prompt < context - 1:
        for entry in leaves(cache):
            add_empty_tokens(entry, context - 1 - prompt)
    if kv_bits:
        check_quantizable(cache)
    with watched([part for layer in found.layers for part in _experts(layer)], watch):
        logits = _one_token(model, cache, kv_bits)
    kv_bytes = [sum(cache[index].nbytes for index in entries) for entries in found.cache_entries]
    windows = [size for entry in leaves(cache) if (size := window(entry))]
    return _Step(kv_bytes, logits.shape[-1], chosen, recurrent, min(windows, default=0))


def _one_token(model: nn.Module, cache: list[Any], kv_bits: int) -> mx.array:
    tokens = mx.zeros((1, 1), mx.int32)
    try:
        if kv_bits:
            quantize(cache, kv_bits)
        logits: mx.array = model(tokens, cache=cache)
        return logits
    except Exception as error:  # custom attention or odd head sizes: any exception
        if not kv_bits:
            raise
        raise UnquantizableError(f"can't use quantized KV caches: {in_one_line(error)}") from error


def _active(layer: nn.Module, measure: Callable[[nn.Module], int], step: _Step) -> int:
    """`measure` of a layer as far as one token needs it: only the routed experts of a mixture."""
    total = measure(layer)
    for module in _experts(layer):
        experts = module.weight.shape[0]
        idle = experts - min(step.chosen.get(id(module), experts), experts)
        total -= measure(module) * idle // experts
    return total


def _experts(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if hasattr(m, "num_experts") and "weight" in m]


def _unread(model: nn.Module, found: Dataflow, vocabulary: int) -> int:
    """Bytes of embeddings of which one token reads a single row.

    The first embedding is read as a whole where it also is the lm_head: where nothing else
    outside the layers has as many rows as there are logits.
    """
    embeddings = [embedding.module for embedding in found.embeddings]
    known = {id(m) for layer in found.layers for m in layer.modules()} | set(map(id, embeddings))
    tied = not any(
        vocabulary in array.shape
        for module in model.modules()
        if id(module) not in known
        for _, array in direct_arrays(module)
    )
    rows = [(nbytes(m), m.weight.shape[0]) for m in embeddings[1 if tied else 0 :]]
    return sum(size - size // count for size, count in rows)
