"""Stage 0 in the caller's own process, of either engine."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node.engines.choose import choose
from node.engines.engine import LoadedHead
from node.weights.fetch import fetch_ranges, is_whole
from node.weights.sources import Sources
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import Ranges
from unicluster.errors import StageError
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import StageSpec

# Runs a coroutine elsewhere, and waits for it.
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def stage_specs(
    checkpoint: Checkpoint, quant: str, cuts: Sequence[tuple[int, int]]
) -> list[StageSpec]:
    """The stages of a model cut into layers [first, end), for one user, in its own engine."""
    engine = choose(checkpoint)
    return [
        StageSpec(
            model=checkpoint.manifest.model,
            quant=quant,
            first_layer=first,
            end_layer=end,
            users=1,
            revision=checkpoint.manifest.revision,
            engine=engine.name,
            finishes=not engine.head_makes_logits and end == cuts[-1][1],
        )
        for first, end in cuts
    ]


@dataclass(frozen=True)
class FirstStage:
    """Stage 0 of a model, to be loaded. hub_files and sources: as `fetch_ranges` takes them."""

    checkpoint: Checkpoint
    spec: StageSpec
    hub_files: Sequence[str] | None = None
    sources: Sequence[str] = ()
    prebuilt: bool = True

    def load(self, identity: Credentials, run: Run) -> tuple[LoadedHead, Any]:
        """Fetches the missing files and loads the stage; also returns the tokenizer.

        Raises StageError where the spec is of another stage; else as Engine.load.
        """
        engine = choose(self.checkpoint, self.spec.engine)
        if not is_whole(self.checkpoint):
            made = engine.made_bytes(self.checkpoint, self.spec)
            run(self._fetch(engine.ranges(self.checkpoint, self.spec), made, identity))
        loaded = engine.load(self.checkpoint, self.spec, prebuilt=self.prebuilt)
        if not isinstance(loaded, LoadedHead):
            raise StageError(f"{self.spec.model}: layers {self.spec.first_layer} on are no head")
        return loaded, engine.tokenizer(self.checkpoint)

    async def _fetch(self, ranges: Mapping[str, Ranges], made: int, identity: Credentials) -> None:
        async with Sources(self.sources, identity) as sources:
            await fetch_ranges(self.checkpoint, ranges, self.hub_files, sources, made=made)
