"""A draft model: small, whole, loaded beside the head's layers to guess ahead."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from node.mlx.lazy import load_lazy
from node.weights.fetch import OnProgress, describe, fetch
from node.weights.sources import Sources
from unicluster.checkpoints.safetensors import read_header
from unicluster.v1.node_pb2 import Draft


async def fetch_draft(draft: Draft, sources: Sources, on_progress: OnProgress) -> Path:
    """Fetches the draft model onto this machine; returns its directory."""
    checkpoint = await describe(draft.model, draft.revision, sources)
    headers = [read_header(checkpoint.root / name) for name in checkpoint.manifest.weights]
    tensors = {name for header in headers for name in header.tensors}
    await fetch(checkpoint, tensors, draft.hub_files, sources, on_progress)
    return checkpoint.root


def load_draft(path: Path, quant: str) -> nn.Module:
    """The draft model with all weights loaded; on the MLX thread."""
    model = load_lazy(path, quant).model
    mx.eval(model.parameters())
    return model
