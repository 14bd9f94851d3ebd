"""What a worker is told to be; apart from the worker, because the agent must not import MLX."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerConfig:
    """One stage: layers [first_layer, end_layer); 0 makes it the head."""

    node: str
    model: str
    quant: str
    first_layer: int
    end_layer: int
    context: int
    users: int
    host: str
    port: int
    identity: dict[str, str]
    revision: str = ""
    sources: tuple[str, ...] = ()
    hub_files: tuple[str, ...] | None = ()  # None: all that the stage needs
    lanes: int = 0
    kv_bytes: int = 0
    foresee: bool = True  # decode steps are built before their input is there; see mlx/prebuilt
    kv_bits: int = 0
    lookup: bool = False
    draft: str = ""  # a model that guesses ahead, if any
    draft_quant: str = ""
    draft_revision: str = ""
    draft_hub_files: tuple[str, ...] = ()
    draft_tokens: int = 0
    engine: str = "mlx"
    finishes: bool = False  # the last stage, where the head can't make logits
