"""A draft model: small, whole, loaded beside the head's layers to guess ahead."""

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_tokenizer

from node.generation.drafting import DraftModel, Lookup, Speculation
from node.mlx.lazy import load_lazy
from node.weights import store
from node.weights.fetch import OnProgress, describe, fetch
from node.weights.sources import Sources
from node.worker.config import WorkerConfig
from unicluster.checkpoints.checkpoint import Checkpoint, is_gguf
from unicluster.checkpoints.safetensors import read_header
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest

# Guessed ahead at most, if nothing else was asked for.
MOST_DRAFTED = 8


def check_tokens(request: InspectRequest, draft: Path) -> None:
    """Raises InputError unless `draft` has the tokens of the model that it is to guess for.

    One of them may have some more, as models of one family do.
    """
    found = store.find(request.drafts_for, request.drafts_for_revision)
    if found is None:
        raise InputError(f"{request.drafts_for}: no longer on this machine")
    ours = load_tokenizer(draft).get_vocab()
    theirs = _tokenizer(found).get_vocab()
    fewer, more = sorted((ours, theirs), key=len)
    if not fewer.items() <= more.items():
        raise InputError(
            f"--draft: its tokens are not those of {Path(request.drafts_for).name}; "
            "a draft must be of the same family"
        )


def _tokenizer(checkpoint: Checkpoint) -> Any:
    if any(map(is_gguf, checkpoint.manifest.weights)):
        from node.worker.load_ggml import load_tokens  # an extra

        return load_tokens(checkpoint)
    return load_tokenizer(checkpoint.root)


async def fetch_draft(config: WorkerConfig, sources: Sources, on_progress: OnProgress) -> Path:
    """Gets the draft model onto this machine; returns its directory."""
    checkpoint = await describe(config.draft, config.draft_revision, sources)
    headers = [read_header(checkpoint.root / name) for name in checkpoint.manifest.weights]
    tensors = {name for header in headers for name in header.tensors}
    await fetch(checkpoint, tensors, config.draft_hub_files, sources, on_progress)
    return checkpoint.root


def load_draft(path: Path, quant: str) -> nn.Module:
    """Loads it all; on the MLX thread."""
    model = load_lazy(path, quant).model
    mx.eval(model.parameters())
    return model


def speculation(
    config: WorkerConfig, draft: nn.Module | None, vocabulary: int
) -> Speculation | None:
    """How the head is to guess ahead, if it is to. `vocabulary`: tokens that the model knows."""
    most = config.draft_tokens or MOST_DRAFTED
    if draft is not None:
        return Speculation(partial(DraftModel, draft, vocabulary), most)
    return Speculation(Lookup, most) if config.lookup else None
