"""Stage 0 in the caller's own process, of either engine."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_lm.utils import load_tokenizer

from node.config import WorkerConfig
from node.hollow import HollowModel
from node.obtain import fetch, is_whole
from node.sources import Sources
from node.survey import survey
from node.weights import LazyModel, load_lazy, load_parts
from unicluster.checkpoint import Checkpoint
from unicluster.trust import Identity

# Runs a coroutine elsewhere, and waits for it.
Run = Callable[[Coroutine[Any, Any, Any]], Any]


class FirstStage(Protocol):
    """What is to be loaded."""

    def load(self, identity: Identity, run: Run) -> tuple[Any, Any]:
        """Its layers, for a PipelineModel, and the tokenizer. Fetches what is not here."""


@dataclass(frozen=True)
class MlxFirst:
    """Layers [0, end) and all that is outside the layers; `hub_files` as in obtain.fetch."""

    checkpoint: Checkpoint
    quant: str
    end: int
    hub_files: Sequence[str] | None
    sources: Sequence[str]

    def load(self, identity: Identity, run: Run) -> tuple[HollowModel, Any]:
        checkpoint = self.checkpoint
        if not is_whole(checkpoint):
            run(self._fetch(identity))
        lazy, hollow = load_head(checkpoint.root, self.quant, self.end)
        ends = lazy.config.get("eos_token_id")
        return hollow, load_tokenizer(lazy.path, eos_token_ids=ends)

    async def _fetch(self, identity: Identity) -> None:
        tensors = await asyncio.to_thread(survey, self.checkpoint.root, self.quant)
        async with Sources(self.sources, identity) as sources:
            await fetch(self.checkpoint, tensors.of_stage(0, self.end), self.hub_files, sources)


@dataclass(frozen=True)
class GgufFirst:
    """The same of a GGUF; `config` is what a worker would be told."""

    config: WorkerConfig

    def load(self, identity: Identity, run: Run) -> tuple[Any, Any]:
        from node.ggml import worker as ggml  # an extra

        checkpoint = run(self._obtain(identity))
        return ggml.load_stage(checkpoint, self.config).front, ggml.load_tokens(checkpoint)

    async def _obtain(self, identity: Identity) -> Checkpoint:
        from node.ggml import worker as ggml

        async with Sources(self.config.sources, identity) as sources:
            return await ggml.obtain(self.config, sources, lambda done, total: None)


def load_head(path: Path, quant: str, end: int) -> tuple[LazyModel, HollowModel]:
    """Layers [0, end) and all that is outside the layers, with their weights in memory."""
    lazy = load_lazy(path, quant)
    hollow = HollowModel(lazy.model, lazy.model_type, 0, end)
    for _ in load_parts((*hollow.layers, lazy.model)):
        pass
    return lazy, hollow
