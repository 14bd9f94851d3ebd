"""What is different in a worker whose stage is one of ggml."""

import asyncio
from collections.abc import Callable
from typing import Any

from mlx_lm.utils import load_config, load_tokenizer

from node.ggml.load import Loaded, Part, load, open_gguf, stage_file
from node.ggml.tokenizer import TEMPLATE, tokenizer_of
from node.weights import store
from node.weights.fetch import describe, fetch_ranges, is_whole
from node.weights.sources import Sources
from node.worker.config import WorkerConfig
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.gguf import Header, read_header
from unicluster.checkpoints.ranges import merged
from unicluster.errors import InputError

OnFetched = Callable[[int, int], None]

# Without either it is no tokenizer that transformers can load.
OWN_TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


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
        file = stage_file(gguf, checkpoint, store.stages(config.model), part)
    return load(gguf, checkpoint.root, file, part)


def load_tokens(checkpoint: Checkpoint) -> Any:
    """The tokenizer of the repository's own files, or else that of the GGUF; so the template."""
    names = checkpoint.manifest.weights
    if not names:
        raise InputError(f"{checkpoint.root}: there is no GGUF in it")
    file = checkpoint.root / names[0]
    header = read_header(file)
    if OWN_TOKENIZER - checkpoint.manifest.files.keys():
        return tokenizer_of(file, header)
    ends = _ends(checkpoint, header)
    tokenizer = load_tokenizer(checkpoint.root, eos_token_ids=ends)
    template = header.get(TEMPLATE)
    if tokenizer.has_chat_template or template is None:
        return tokenizer
    # At once, because how tools and reasoning are marked is told by the template.
    return load_tokenizer(checkpoint.root, {"chat_template": template}, eos_token_ids=ends)


def _ends(checkpoint: Checkpoint, header: Header) -> set[int]:
    """The tokens that end an answer, besides the tokenizer's own."""
    found = {header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    if "config.json" in checkpoint.manifest.files:
        stated = load_config(checkpoint.root).get("eos_token_id")
        found |= set(stated) if isinstance(stated, list) else {stated}
    return {int(token) for token in found if token is not None}
