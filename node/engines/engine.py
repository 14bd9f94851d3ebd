"""An engine: the verbs by which a machine inspects, fetches and computes a range of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from node.pipeline.pipeline_model import Front
from node.ring.session import StageEngine
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import Ranges
from unicluster.v1.node_pb2 import InspectRequest, LoadProgress, ModelLayout, StageSpec

OnLoaded = Callable[[LoadProgress], None]


def ignore(progress: LoadProgress) -> None:
    """For callers that show no progress."""


@dataclass(frozen=True)
class LoadedHead:
    """Stage 0 in memory. prebuilt: whether its decode steps may be built before their input."""

    front: Front
    weight_bytes: int
    prebuilt: bool


@dataclass(frozen=True)
class LoadedStage:
    """A stage other than 0 in memory, ready to serve frames."""

    stage: StageEngine
    weight_bytes: int


class Engine(Protocol):
    """Computes layers of checkpoints of its formats. There are two, MLX and ggml.

    An engine reads the range [first_layer, end_layer) of a StageSpec, and the options that act
    in it. `choose` in the module beside this one makes the engine of a checkpoint.
    """

    @property
    def name(self) -> str:
        """Name, as in StageSpec.engine and ModelLayout.engine."""

    @property
    def head_makes_logits(self) -> bool:
        """Whether stage 0 applies final norm and lm_head; else the last stage has to."""

    @property
    def can_draft(self) -> bool:
        """Whether a checkpoint of this engine can be a draft model."""

    def inspect(self, checkpoint: Checkpoint, request: InspectRequest) -> ModelLayout:
        """Bytes of weights and KV caches, layer by layer, with the options of `request`.

        Only small files and the headers of weights need be here. Raises InputError for a bad
        checkpoint or options that don't suit it, StageError for a model that can't be cut.
        """

    def ranges(self, checkpoint: Checkpoint, spec: StageSpec) -> Mapping[str, Ranges]:
        """Byte ranges that the stage needs by file, from the headers alone; as `inspect` raises."""

    def made_bytes(self, checkpoint: Checkpoint, spec: StageSpec) -> int:
        """Bytes of the files that `load` still has to write for the stage."""

    def load(
        self,
        checkpoint: Checkpoint,
        spec: StageSpec,
        on_progress: OnLoaded = ignore,
        *,
        prebuilt: bool = True,
    ) -> LoadedHead | LoadedStage:
        """Loads the stage, whose bytes are here; on the thread that is to compute it.

        `prebuilt`: decode steps may be prebuilt, where the engine can. Raises InputError or
        StageError.
        """

    def cache_settings(self, spec: StageSpec) -> str:
        """All but checkpoint and layers that saved caches of a stage depend on, as text."""

    def tokenizer(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint's tokenizer, as mlx-lm wraps one. Raises InputError where none is."""
