"""Options of `serve`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import click

from coordinator.models.catalog import Source
from coordinator.planning.placement import Objective
from coordinator.recovery.survey import MARGIN
from unicluster.cluster.here import DEFAULT_PORTS
from unicluster.cluster.records import Kind
from unicluster.command_line import Option
from unicluster.telemetry.broker_url import BrokerUrl
from unicluster.v1.node_pb2 import StageSpec

DEFAULT_PORT = DEFAULT_PORTS[Kind.CHAT]
DEFAULT_HTTP_PORT = 8080
# How long an answer that broke off may wait for the model.
RECOVER_SECONDS = 300.0


# How long a plan must be better before the layers move.
SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class Rebalancing:
    """When layers move to machines that have come.

    margin: the part of a token's time that this must save; None: they move only when asked.
    settle_s: seconds for which that must have been so.
    """

    margin: float | None = MARGIN
    settle_s: float = SETTLE_SECONDS


@dataclass(frozen=True)
class HttpOptions:
    """The HTTP door.

    certificate: a PEM file with key, for TLS; "cluster": of the cluster's authority.
    plain: whether other machines may ask without. names: of this machine, for the Host header.
    origins: pages whose scripts may ask.
    """

    port: int = DEFAULT_HTTP_PORT
    certificate: Path | None = None
    plain: bool = False
    names: Sequence[str] = field(default=())
    origins: Sequence[str] = field(default=())


@dataclass(frozen=True)
class ServeOptions:
    """The model to serve, where and how."""

    source: Source
    gguf: Source | None = None  # the same model, for the other engine
    context: int = 0
    users: int = 1
    objective: Objective = "latency"
    generation: StageSpec = field(default_factory=StageSpec)  # template of each stage's
    nodes: list[str] | None = None
    peers: Sequence[str] = field(default=())
    host: str = ""
    port: int = DEFAULT_PORT
    broker: BrokerUrl | None = None
    metrics_port: int | None = None
    recover_s: float = RECOVER_SECONDS  # that an answer which broke off may wait
    rebalancing: Rebalancing = field(default_factory=Rebalancing)
    http: HttpOptions | None = None
    service: str = ""  # its name, by which machines know its stages; empty: nobody takes it up
    orphan_grace_s: float = 0.0  # that stages live on without their coordinator


def objective_option() -> Option:
    return Option(
        "--objective",
        "latency (default): tokens per second for one user; throughput: for all together",
        type=click.Choice(get_args(Objective)),
        default="latency",
    )
