"""A machine that may take a stage, and how fast each of its engines is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.planning.engines import DEFAULT, ENGINES
from unicluster.v1 import node_pb2
from unicluster.v1.node_pb2 import NodeInfo


@dataclass(frozen=True)
class Device:
    """A device of an engine: usable bytes of its memory, and bytes per second that it gives.

    compute: operations per second, 0 if unknown. chip: what it is, for people.
    """

    name: str
    usable: int
    bandwidth: float
    compute: float = 0.0
    chip: str = ""


@dataclass(frozen=True)
class EngineSpeeds:
    """One engine on one machine.

    bandwidth: bytes per second that it gets from the memory. backend: cpu, metal, cuda, ...
    compute: operations per second, 0 if unknown. slowdown: seconds it takes over those predicted,
    for the model that is planned; `measured` here, or concluded from other machines.
    usable: bytes of memory that it reaches; None: as many as the machine offers.
    devices: those it computes on, the fastest first, whose figures then count. A stage takes the
    first, and of further ones what it needs besides. Empty: it is not known which there are.
    """

    bandwidth: float
    backend: str = ""
    compute: float = 0.0
    slowdown: float = 1.0
    measured: bool = False
    usable: int | None = None
    devices: tuple[Device, ...] = ()

    @classmethod
    def of(cls, devices: Iterable[Device], backend: str) -> EngineSpeeds:
        """An engine with its devices; at least one."""
        ordered = tuple(sorted(devices, key=lambda device: (-device.bandwidth, device.name)))
        first = ordered[0]
        return cls(
            bandwidth=first.bandwidth,
            backend=backend,
            compute=first.compute,
            usable=sum(device.usable for device in ordered),
            devices=ordered,
        )


@dataclass(frozen=True)
class Machine:
    """A machine as planning sees it; `usable` in bytes: the most that one of its engines reaches.

    engines: those it can compute stages with, by name, in the order of ENGINES.
    link: its fastest network port, as in `links.LINKS`. address: where its agent is reached now;
    addresses: where it may be, that one first. id: what TLS proves of it; see `Reached`.
    """

    name: str
    address: str
    usable: int
    engines: Mapping[str, EngineSpeeds] = field(hash=False)
    chip: str = ""
    link: str = ""
    addresses: tuple[str, ...] = ()
    id: str = ""

    @classmethod
    def uniform(cls, name: str, usable: int, bandwidth: float) -> Machine:
        """A machine on which every engine gets the same bandwidth."""
        return cls(name, "", usable, dict.fromkeys(ENGINES, EngineSpeeds(bandwidth)))

    @classmethod
    def from_proto(
        cls, info: NodeInfo, address: str, addresses: Iterable[str] = (), machine: str = ""
    ) -> Machine:
        engines = _engines_of(info)
        reached = [s.usable for s in engines.values() if s.usable is not None]
        return cls(
            name=info.name,
            address=address,
            addresses=tuple(dict.fromkeys([address, *addresses])),
            id=machine,
            usable=max(reached, default=info.usable_memory),
            engines=engines,
            chip=info.chip,
        )

    def can(self, engine: str) -> bool:
        """Whether that engine is there to compute stages."""
        return engine in self.engines

    def reach(self, engine: str) -> int:
        """Usable bytes of memory that one of its engines reaches, on all of its devices."""
        usable = self.engines[engine].usable
        return self.usable if usable is None else usable

    def only(self, engines: Iterable[str]) -> Machine:
        """This machine without its other engines."""
        wanted = set(engines)
        return replace(self, engines={e: s for e, s in self.engines.items() if e in wanted})

    def with_speeds(self, speeds: Mapping[str, EngineSpeeds]) -> Machine:
        """This machine with other speeds of some of its engines."""
        return replace(self, engines={e: speeds.get(e, s) for e, s in self.engines.items()})

    def with_usable(self, usable: int, engines: Iterable[str] = ()) -> Machine:
        """This machine with so many usable bytes for some of its engines (default: all).

        As if each had one device, its fastest.
        """
        changed = set(engines) or set(self.engines)
        speeds = {
            engine: replace(
                speeds,
                usable=usable,
                devices=tuple(replace(d, usable=usable) for d in speeds.devices[:1]),
            )
            for engine, speeds in self.engines.items()
            if engine in changed
        }
        other = self.with_speeds(speeds)
        return replace(other, usable=max(map(other.reach, other.engines), default=usable))


def _engines_of(info: NodeInfo) -> dict[str, EngineSpeeds]:
    """The speeds of the engines that a machine offers."""
    if not info.devices:
        return _of_one_memory(info)
    listed = {
        engine: [device for device in info.devices if (device.engine or DEFAULT) == engine]
        for engine in ENGINES
    }
    return {
        engine: EngineSpeeds.of(map(_device, devices), devices[0].backend)
        for engine, devices in listed.items()
        if devices
    }


def _device(device: node_pb2.Device) -> Device:
    return Device(device.name, device.usable_memory, device.bandwidth, chip=device.description)


def _of_one_memory(info: NodeInfo) -> dict[str, EngineSpeeds]:
    """The speeds of the engines of an older agent, which all reach the same memory."""
    backend, bandwidth = info.ggml_backend or info.backend, info.ggml_bandwidth or info.bandwidth
    speeds = {
        "mlx": EngineSpeeds(info.bandwidth, info.backend),
        "ggml": EngineSpeeds(bandwidth, backend),
    }
    offered = set(info.engines) or {DEFAULT}
    return {e: s for e, s in speeds.items() if e in offered and s.backend != "none"}
