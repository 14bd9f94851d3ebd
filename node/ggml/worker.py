"""What is different in a worker whose stage is one of ggml."""

import asyncio
from collections.abc import Callable
from typing import Any

from mlx_lm.utils import load_tokenizer

from node import cache
from node.config import WorkerConfig
from node.ggml.load import Loaded, Part, load, open_gguf, stage_file
from node.ggml.tokenizer import tokenizer_of
from node.obtain import describe, fetch_ranges, is_whole
from node.sources import Sources
from unicluster.checkpoint import Checkpoint
from unicluster.errors import InputError
from unicluster.gguf import read_header
from unicluster.ranges import merged

OnFetched = Callable[[int, int], None]


async def obtain(config: WorkerConfig, sources: Sources, tell: OnFetched) -> Checkpoint:
    """Gets what the stage needs of a GGUF onto this machine, and no more."""
    checkpoint = await describe(config.model, config.revision, sources)
    if not is_whole(checkpoint):
        gguf = await asyncio.to_thread(open_gguf, checkpoint)
        wanted = gguf.of_stage(config.first_layer, config.end_layer, config.finishes)
        ranges = {name: merged(found) for name, found in wanted.items()}
        await fetch_ranges(checkpoint, ranges, config.hub_files, sources, tell)
    return checkpoint


def load_stage(checkpoint: Checkpoint, config: WorkerConfig) -> Loaded:
    """Loads it; on the thread that is to compute it."""
    gguf = open_gguf(checkpoint)
    part = Part(config.first_layer, config.end_layer, config.finishes, config.context, config.users)
    if part.first == 0 and part.end == gguf.layers and is_whole(checkpoint):
        gguf.check_cut(part.first, part.end)
        file = checkpoint.root / checkpoint.manifest.weights[0]
    else:
        file = stage_file(gguf, checkpoint, cache.stages(config.model), part)
    return load(gguf, checkpoint.root, file, part)


def load_tokens(checkpoint: Checkpoint) -> Any:
    """The tokenizer of the repository's own files, or else that of the GGUF."""
    if "tokenizer.json" in checkpoint.manifest.files:
        return load_tokenizer(checkpoint.root)
    names = checkpoint.manifest.weights
    if not names:
        raise InputError(f"{checkpoint.root}: there is no GGUF in it")
    file = checkpoint.root / names[0]
    return tokenizer_of(file, read_header(file))
