"""The settings of the generation engine: those of the stage, and what follows from its model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.generation.sampling import Sampling
from node.prefixes.index import PrefixIndex
from node.speculation.drafting import Speculation
from unicluster.checkpoints.small_files import GENERATION_CONFIG, check_small_files
from unicluster.v1.node_pb2 import StageSpec

# A prefill chunk: long enough to keep a stage busy, short enough for a frame of this size.
PREFILL_TOKENS = 512
PREFILL_BYTES = 8 * 2**20
# Requests that may wait, for each that may run.
QUEUED_PER_USER = 4


@dataclass(frozen=True)
class GenerationConfig:
    """All settings of a GenerationEngine, passed as a whole to every module that reads one.

    spec: the head's stage, whose options (`context`, `users`, `lanes`, `kv_bytes`, `kv_bits`) are
    read where they act. model_name: as requests call it. prefill_step: prompt tokens in a chunk,
    at most. defaults: the model's generation_config.json. speculation: how tokens are drafted
    ahead, if they are. queue_limit: requests that wait, at most; None: four times the users.
    prefixes: those on disk; None: nothing is kept there.
    """

    spec: StageSpec
    model_name: str
    prefill_step: int = PREFILL_TOKENS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    speculation: Speculation | None = None
    queue_limit: int | None = None
    prefixes: PrefixIndex | None = None

    @classmethod
    def of(
        cls,
        spec: StageSpec,
        path: Path,
        hidden_bytes: int,
        speculation: Speculation | None,
        prefixes: PrefixIndex | None = None,
    ) -> "GenerationConfig":
        """The settings for a model in `path`, one token of which has `hidden_bytes` in a frame.

        Raises InputError where its generation_config.json is damaged.
        """
        return cls(
            spec,
            model_name=path.name,
            prefill_step=chunk_tokens(hidden_bytes),
            defaults=_defaults(path),
            speculation=speculation,
            prefixes=prefixes,
        )

    @property
    def most_waiting(self) -> int:
        """Requests that may wait while all users are served."""
        asked = self.queue_limit
        return QUEUED_PER_USER * self.spec.users if asked is None else asked


def chunk_tokens(hidden_bytes: int) -> int:
    """Prompt tokens in a prefill chunk, by the bytes of one token's layer output."""
    return max(1, min(PREFILL_TOKENS, PREFILL_BYTES // hidden_bytes))


def check_defaults(path: Path) -> None:
    """Raises InputError where the generation_config.json in `path` is damaged or out of range."""
    Sampling.of_model(_defaults(path))


def _defaults(path: Path) -> dict[str, Any]:
    check_small_files(path, [GENERATION_CONFIG])
    try:
        loaded: dict[str, Any] = json.loads((path / GENERATION_CONFIG).read_bytes())
    except FileNotFoundError:
        return {}
    return loaded
