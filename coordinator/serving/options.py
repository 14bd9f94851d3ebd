"""What `serve` was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.models.catalog import Source
from coordinator.planning.placement import Objective
from coordinator.serving.generation_options import Serving
from unicluster.telemetry.broker_url import BrokerUrl

DEFAULT_PORT = 47700


@dataclass(frozen=True)
class ServeOptions:
    """What is to be served, where and how."""

    source: Source
    gguf: Source | None = None  # the same model, for the other engine
    context: int = 0
    users: int = 1
    objective: Objective = "latency"
    serving: Serving = field(default_factory=Serving)
    nodes: list[str] | None = None
    peers: Sequence[str] = field(default=())
    host: str = ""
    port: int = DEFAULT_PORT
    broker: BrokerUrl | None = None
    metrics_port: int | None = None
