"""How a model is served, beyond where its layers lie."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """What `serve` was asked for and the head does."""

    lanes: int = 0  # batches that take turns; 0: one a stage
