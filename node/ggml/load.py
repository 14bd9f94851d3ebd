"""From a GGUF, whole or in part, to a stage that is ready to compute."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from node.ggml.architectures import KNOWN, known
from node.ggml.complete import check_layers, check_parts
from node.ggml.cut import Gguf
from node.ggml.embedding import Embedding
from node.ggml.front import GgmlFront
from node.ggml.layers import Layers, Sizes
from node.ggml.stage import GgmlStage
from node.ggml.stage_file import Part, StageFile
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.context import longest_context
from unicluster.checkpoints.gguf import read_header

# Where nobody says how much context there is to be.
DEFAULT_CONTEXT = 8192
# llama.cpp rounds the tokens of a KV cache up to such. One token's values lie far apart there: if
# that is a multiple of 4 KiB they share a few lines of the processor's caches, and a prompt takes
# an eighth longer.
CELLS = 256
UNLUCKY_CELLS = 2048
# States beside those of the users: prefix caches, and sources of copies.
SPARE_STATES = 4
# Prefix caches may be many, where they take no more memory than their tokens do.
SEQUENCES_PER_USER = 16
THREADS_ENV = "UNICLUSTER_GGML_THREADS"


@dataclass(frozen=True)
class Loaded:
    """front: of stage 0, for the head."""

    stage: GgmlStage
    front: GgmlFront | None
    weight_bytes: int


def open_gguf(checkpoint: Checkpoint) -> Gguf:
    """Raises InputError for damaged headers, and where a part or a tensor is missing from them.

    The bytes of the tensors need not be here.
    """
    root = checkpoint.root
    headers = {name: read_header(root / name) for name in checkpoint.manifest.weights}
    check_parts(root, headers)
    gguf = Gguf(headers)
    if gguf.header.architecture in KNOWN:
        check_layers(root, headers)
    return gguf


def load(gguf: Gguf, folder: Path, file: StageFile | Path, part: Part) -> Loaded:
    """Loads the stage in `file`, which it holds if it was made; `folder` has the model's own files.

    Raises StageError when llama.cpp can't load it.
    """
    sizes = Sizes(
        layers=part.end - part.first,
        hidden=gguf.hidden_size,
        cells=cells(part.context or DEFAULT_CONTEXT, part.users),
        vocabulary=gguf.vocabulary if part.has_lm_head else 0,
        sequences=SEQUENCES_PER_USER * (part.users + 1),
        states=2 * part.users + SPARE_STATES,
        threads=int(os.environ.get(THREADS_ENV, "0")) or cores(),
        entry=known(gguf.header).entry,
        exact=gguf.is_exact,
        heads=gguf.heads,
        devices=part.devices,
    )
    layers = Layers(file if isinstance(file, Path) else file.path, sizes)
    embedding = Embedding(gguf, folder) if part.first == 0 else None
    stage = GgmlStage(layers, embedding, file)
    front = GgmlFront(layers, stage, is_whole=part.has_lm_head) if embedding is not None else None
    return Loaded(stage, front, layers.weight_bytes)


def cells(context: int, users: int) -> int:
    """Cells of a KV cache: tokens of all users together, rounded up."""
    rounded = -(-context * users // CELLS) * CELLS
    return rounded if rounded % UNLUCKY_CELLS else rounded + CELLS


def cores() -> int:
    """Cores this process may use; llama.cpp by itself takes four threads, whatever there are."""
    real = psutil.cpu_count(logical=False) or 1
    return min(real, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else real


def context_limit(gguf: Gguf) -> int:
    """The most tokens the model is made for; 0 when it doesn't say."""
    arch = gguf.header.arch
    scaling = {
        "type": arch("rope.scaling.type", "none"),
        "factor": arch("rope.scaling.factor", 0),
        "original_max_position_embeddings": arch("rope.scaling.original_context_length", 0),
    }
    return longest_context(int(arch("context_length", 0)), scaling)
