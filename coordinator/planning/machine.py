"""A machine that may take a stage, and how fast each of its engines is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.planning.engines import DEFAULT, ENGINES
from unicluster.v1.node_pb2 import NodeInfo


@dataclass(frozen=True)
class EngineSpeeds:
    """One engine on one machine.

    bandwidth: bytes per second that it gets from the memory. backend: cpu, metal, cuda, ...
    compute: operations per second, 0 if unknown. slowdown: seconds it takes over those predicted,
    for the model that is planned; `measured` here, or concluded from other machines.
    """

    bandwidth: float
    backend: str = ""
    compute: float = 0.0
    slowdown: float = 1.0
    measured: bool = False


@dataclass(frozen=True)
class Machine:
    """A machine as planning sees it; `usable` in bytes.

    engines: those it can compute stages with, by name, in the order of ENGINES.
    link: its fastest network port, as in `links.LINKS`.
    """

    name: str
    address: str
    usable: int
    engines: Mapping[str, EngineSpeeds] = field(hash=False)
    chip: str = ""
    link: str = ""

    @classmethod
    def uniform(cls, name: str, usable: int, bandwidth: float) -> Machine:
        """A machine on which every engine gets the same bandwidth."""
        return cls(name, "", usable, dict.fromkeys(ENGINES, EngineSpeeds(bandwidth)))

    @classmethod
    def from_proto(cls, info: NodeInfo, address: str) -> Machine:
        return cls(
            name=info.name,
            address=address,
            usable=info.usable_memory,
            engines=_engines_of(info),
            chip=info.chip,
        )

    def can(self, engine: str) -> bool:
        """Whether that engine is there to compute stages."""
        return engine in self.engines

    def only(self, engines: Iterable[str]) -> Machine:
        """This machine without its other engines."""
        wanted = set(engines)
        return replace(self, engines={e: s for e, s in self.engines.items() if e in wanted})

    def with_speeds(self, speeds: Mapping[str, EngineSpeeds]) -> Machine:
        """This machine with other speeds of some of its engines."""
        return replace(self, engines={e: speeds.get(e, s) for e, s in self.engines.items()})


def _engines_of(info: NodeInfo) -> dict[str, EngineSpeeds]:
    """The speeds of the engines that a machine offers, from its fields for each."""
    backend, bandwidth = info.ggml_backend or info.backend, info.ggml_bandwidth or info.bandwidth
    speeds = {
        "mlx": EngineSpeeds(info.bandwidth, info.backend),
        "ggml": EngineSpeeds(bandwidth, backend),
    }
    offered = set(info.engines) or {DEFAULT}
    return {e: s for e, s in speeds.items() if e in offered and s.backend != "none"}
