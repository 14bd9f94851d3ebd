"""Layout of a GGUF: bytes of weights and KV cache, layer by layer, from its header."""

import importlib.util
import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import LlamaFileType

from node.ggml.cut import EMBEDDING, OUTPUT, Gguf, write_empty
from node.ggml.cutting import caches
from node.ggml.cutting.kinds import forbidden_counts, forbidden_cuts
from node.ggml.layers import Layers
from node.ggml.library import UnknownArchitectureError
from node.ggml.load import (
    DEFAULT_CONTEXT,
    cache_sizes,
    context_limit,
    open_gguf,
    stage_sizes,
)
from node.ggml.stage_file import Part
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.errors import InputError, StageError, UniclusterError
from unicluster.v1.node_pb2 import ModelLayout, WeightFile

# Quantization by general.file_type; no name where it was only guessed.
FILE_TYPES = {
    int(kind): kind.name.partition("_")[2].lower().removesuffix("_moe")
    for kind in LlamaFileType
    if kind is not LlamaFileType.GUESSED
}
SINGLE = 4
CPU = "CPU"  # llama.cpp's name of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """Facts about stages, or one of them, as llama.cpp says them.

    workspace_bytes: of the buffers that the stage computes in which takes most; 0: not known.
    recurrent, window: as in ModelLayout.
    """

    workspace_bytes: int = 0
    recurrent: bool = False
    window: int = 0


def inspect(checkpoint: Checkpoint, context: int, users: int) -> ModelLayout:
    """The exact bytes of weights and caches; of the files only the headers need be here.

    Raises InputError for a damaged file or an impossible context, StageError for an architecture
    that can't be served, or that llama.cpp does not have.
    """
    gguf = open_gguf(checkpoint)
    manifest, limit = checkpoint.manifest, context_limit(gguf)
    if context and limit and context > limit:
        raise InputError(
            f"context: {context} tokens, and {manifest.model} is made for at most {limit}"
        )
    context = context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    asked = ask(gguf, context, users)
    layers = [gguf.of_layer(layer) for layer in range(gguf.layers)]
    sizes = [sum(gguf.tensors[name][1].size for name in names) for names in layers]
    active = [sum(_active(gguf, name) for name in names) for names in layers]
    # What follows the last layer is where that is; at the head is the embedding.
    after = sum(gguf.tensors[n][1].size for n in gguf.outside() if n not in (EMBEDDING, OUTPUT))
    after += gguf.tensors[gguf.output_name][1].size
    sizes[-1] += after
    active[-1] += after
    return ModelLayout(
        model_type=gguf.header.architecture,
        layer_bytes=sizes,
        layer_active_bytes=active,
        head_bytes=gguf.embedding.size,
        kv_bytes_per_layer=planned_bytes(gguf, context, users),
        context=context,
        users=users,
        hidden_bytes=SINGLE * gguf.width,
        quant=_quant(gguf),
        max_context=limit,
        forbidden_cuts=forbidden_cuts(gguf.header),
        forbidden_counts=forbidden_counts(gguf.header),
        embed_bytes=gguf.embedding.size,
        head_active_bytes=gguf.embedding.size // gguf.vocabulary,
        parameters=sum(prod(tensor.shape) for _, tensor in gguf.tensors.values()),
        layer_active_parameters=[
            round(sum(_active_share(gguf, n) * prod(gguf.tensors[n][1].shape) for n in names))
            for names in layers
        ],
        revision=manifest.revision,
        files=[_file(checkpoint, gguf, name) for name in manifest.weights],
        engine="ggml",
        hidden_size=gguf.hidden_size,
        tail_bytes=after,
        vocabulary=gguf.vocabulary,
        workspace_bytes=asked.workspace_bytes,
        recurrent=asked.recurrent,
        window=asked.window,
    )


def cache_bytes(gguf: Gguf, context: int, users: int) -> list[int]:
    """Bytes of KV cache of each layer, for all users at the full context, as allocated."""
    return caches.cache_bytes(*cache_sizes(gguf, context, users))


def host_bytes(gguf: Gguf, context: int, users: int) -> list[int]:
    """Bytes of each layer's caches that wait on the host, at most."""
    return caches.host_bytes(*cache_sizes(gguf, context, users))


def planned_bytes(gguf: Gguf, context: int, users: int) -> list[int]:
    """Bytes of each layer's caches, in llama.cpp and on the host."""
    both = cache_bytes(gguf, context, users), host_bytes(gguf, context, users)
    return [here + waiting for here, waiting in zip(*both, strict=True)]


def ask(gguf: Gguf, context: int, users: int) -> Asked:
    """Facts about a model that llama.cpp knows, and its file does not say.

    It is asked without any weights, for steps as on a CPU and as on a GPU, of two halves of the
    model: buffers serve one layer after the other. Nothing is known where there is no llama.cpp, or
    one that doesn't take the model; then plans reckon by the hidden state's size. Raises StageError
    where it has no such architecture.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return Asked()
    forbidden = set(forbidden_cuts(gguf.header))
    cuts = [cut for cut in range(1, gguf.layers) if cut not in forbidden]
    bounds = sorted({0, *cuts[len(cuts) // 2 :][:1], gguf.layers})
    asked = []
    try:
        with TemporaryDirectory() as folder:
            for first, end in pairwise(bounds):
                here = ((CPU, end - first),)
                part = Part(first, end, end == gguf.layers, context, users, here)
                asked += _asked(gguf, part, Path(folder) / "stage.gguf")
    except UnknownArchitectureError as error:
        name = next(iter(gguf.tensors.values()))[0]
        raise StageError(f"{name}: {error}") from error
    except UniclusterError as error:
        log.info("llama.cpp can't say what it would compute in: %s", error)
        return Asked()
    windows = [each.window for each in asked if each.window]
    return Asked(
        max(each.workspace_bytes for each in asked),
        any(each.recurrent for each in asked),
        min(windows, default=0),
    )


def _asked(gguf: Gguf, part: Part, file: Path) -> list[Asked]:
    """Facts about a stage, with steps as on a CPU and as on a GPU."""
    with file.open("wb") as stream:
        write_empty(gguf, stream, part.first, part.end, part.has_lm_head)
    sizes = replace(stage_sizes(gguf, part), simulated=True)
    found = []
    for large in (False, True):
        layers = Layers(file, replace(sizes, large_steps=large))
        found.append(Asked(layers.workspace_bytes, layers.recurrent, layers.window))
        layers.close()
    return found


def _active(gguf: Gguf, name: str) -> int:
    return int(gguf.tensors[name][1].size * _active_share(gguf, name))


def _active_share(gguf: Gguf, name: str) -> float:
    """The part of a tensor that one token needs: of experts only those chosen."""
    used, count = gguf.header.arch("expert_used_count", 0), gguf.header.arch("expert_count", 0)
    if not count or "_exps." not in name:
        return 1
    return float(max(used) if isinstance(used, list) else used) / float(count)


def _quant(gguf: Gguf) -> str:
    """Quantization of most weights, by its usual name."""
    stated = FILE_TYPES.get(gguf.header.get("general.file_type", -1))
    if stated is not None:
        return stated
    by_type: dict[str, int] = {}
    for _, tensor in gguf.tensors.values():
        by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.size
    return max(by_type, key=lambda name: by_type[name])


def _file(checkpoint: Checkpoint, gguf: Gguf, name: str) -> WeightFile:
    deferred = {tensor for tensor, (file, _) in gguf.tensors.items() if file == name}
    return WeightFile(
        name=name,
        size=checkpoint.manifest.files[name].size,
        layers=[layer for layer in range(gguf.layers) if deferred & set(gguf.of_layer(layer))],
        outside=bool(deferred & set(gguf.outside())),
    )
