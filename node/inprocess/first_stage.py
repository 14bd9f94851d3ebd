"""Stage 0 in the caller's own process, of either engine."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_lm.utils import load_tokenizer

from node.mlx.hollow import HollowModel
from node.mlx.lazy import LazyModel, load_lazy, load_parts
from node.mlx.survey import survey
from node.weights.fetch import fetch, is_whole
from node.weights.sources import Sources
from node.worker.config import WorkerConfig
from unicluster.checkpoints.checkpoint import Checkpoint, is_gguf
from unicluster.cluster.trust import Identity

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
    """The same of a GGUF; `finishes`: it is all of it."""

    checkpoint: Checkpoint
    end: int
    finishes: bool
    hub_files: Sequence[str] | None
    sources: Sequence[str]

    def load(self, identity: Identity, run: Run) -> tuple[Any, Any]:
        from node.worker import load_ggml as ggml  # an extra

        config = WorkerConfig(
            node="here",
            model=self.checkpoint.manifest.model,
            quant="",
            first_layer=0,
            end_layer=self.end,
            context=0,
            users=1,
            host="",
            port=0,
            identity={},
            revision=self.checkpoint.manifest.revision,
            hub_files=None if self.hub_files is None else tuple(self.hub_files),
            finishes=self.finishes,
        )

        async def obtain() -> Checkpoint:
            async with Sources(self.sources, identity) as sources:
                return await ggml.obtain(config, sources, lambda done, total: None)

        checkpoint = run(obtain())
        return ggml.load_stage(checkpoint, config).front, ggml.load_tokens(checkpoint)


def first_stage(
    checkpoint: Checkpoint,
    quant: str,
    cuts: Sequence[tuple[int, int]],
    hub_files: Sequence[str] | None = None,
    sources: Sequence[str] = (),
) -> FirstStage:
    """That of a model so cut, in its engine."""
    end = cuts[0][1]
    if engine_of(checkpoint) == "mlx":
        return MlxFirst(checkpoint, quant, end, hub_files, sources)
    return GgufFirst(checkpoint, end, len(cuts) == 1, hub_files, sources)


def engine_of(checkpoint: Checkpoint) -> str:
    """What computes a model."""
    return "ggml" if any(map(is_gguf, checkpoint.manifest.weights)) else "mlx"


def load_head(path: Path, quant: str, end: int) -> tuple[LazyModel, HollowModel]:
    """Layers [0, end) and all that is outside the layers, with their weights in memory."""
    lazy = load_lazy(path, quant)
    hollow = HollowModel(lazy.model, lazy.model_type, 0, end)
    for _ in load_parts((*hollow.layers, lazy.model)):
        pass
    return lazy, hollow
