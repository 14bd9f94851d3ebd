"""Memory that stages hold on this machine's devices, and what new ones may take."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from node.agent.devices import Device
from node.agent.probe import Hardware
from unicluster.errors import DoesNotFitError, InputError, shown
from unicluster.units import format_bytes
from unicluster.v1 import node_pb2
from unicluster.v1.node_pb2 import StageSpec

# Engine meant by a spec that names none: see StageSpec.
_DEFAULT = "mlx"


@dataclass(frozen=True)
class Part:
    """Bytes of a stage on one device."""

    device: Device
    bytes: int


class Ledger:
    """Counts by device. cap: bytes that all stages together may take; None: no cap."""

    def __init__(self, hardware: Hardware, cap: int | None) -> None:
        self.hardware = hardware
        self._cap = cap
        self._alone: dict[str, int] = {}
        for device in hardware.devices:
            self._alone[device.unit] = max(device.alone, self._alone.get(device.unit, 0))

    def parts(self, spec: StageSpec) -> list[Part]:
        """A stage's bytes by device. One that names no devices is on its engine's first.

        Raises InputError for an engine or a device that is not offered, or a split that is none.
        """
        engine = spec.engine or _DEFAULT
        devices = {device.name: device for device in self.hardware.of(engine)}
        if not devices:
            offered = ", ".join(self.hardware.engines) or "none"
            raise InputError(f"no engine {shown(engine)} is offered here: there is {offered}")
        if len(spec.devices) < 2:
            name = spec.devices[0].name if spec.devices else next(iter(devices))
            return [Part(_named(name, devices), spec.memory)]
        if sum(share.layers for share in spec.devices) != spec.end_layer - spec.first_layer:
            raise InputError("devices: their layers are not those of the stage")
        if engine == _DEFAULT or len({share.name for share in spec.devices}) < len(spec.devices):
            raise InputError(f"devices: no split for {engine}: {len(spec.devices)} shares")
        return [Part(_named(share.name, devices), share.memory) for share in spec.devices]

    def usable(
        self, stages: Sequence[StageSpec], leaving: Sequence[tuple[StageSpec, int]] = ()
    ) -> list[tuple[Device, int]]:
        """Bytes that new stages may take now of each device, beside `stages`; may run a command.

        Devices of one engine can be taken all at once, those of two engines instead of each other.
        leaving: stages, with their bytes in memory now, that count as ended. As much as they were
        promised can be promised again: it was free before they came.
        """
        parts = self._held(stages)
        freed = [part for spec, size in leaving for part in self._loaded(spec, size)]
        promised: Counter[Device] = Counter()
        for part in self._held([spec for spec, _ in leaving]):
            promised[part.device] += part.bytes
        reading = self.hardware.read(_by_unit(parts)).with_freed(freed)
        offers: list[tuple[Device, int]] = []
        for engine in self.hardware.engines:
            devices, left = self.hardware.of(engine), self._left(parts)
            for device, read in zip(devices, reading.usable(devices), strict=True):
                free = max(read, promised[device])
                usable = free if left is None else min(free, left)
                left = None if left is None else left - usable
                offers.append((device, usable))
        return offers

    def check(self, spec: StageSpec, stages: Sequence[StageSpec]) -> None:
        """Raises as `parts`, or DoesNotFitError where too much is reserved for other `stages`.

        Only what stages were promised counts, whatever else the memory is used for.
        """
        held = self._held(stages)
        wanted = self.parts(spec)
        for part in wanted:
            room = self._unreserved(part.device, held)
            if part.bytes > room:
                where = part.device.name if len(wanted) > 1 else "this machine"
                raise DoesNotFitError(
                    f"a stage of {format_bytes(part.bytes)} does not fit: {where} can give "
                    f"{format_bytes(room)} more"
                )
            held = [*held, part]

    def _held(self, stages: Sequence[StageSpec]) -> list[Part]:
        return [part for spec in stages for part in self.parts(spec)]

    def _loaded(self, spec: StageSpec, size: int) -> list[tuple[Device, int]]:
        """Bytes that a stage has in memory, by device, in the proportions of its plan."""
        parts = self.parts(spec)
        planned = sum(part.bytes for part in parts) or 1
        return [(p.device, min(size * p.bytes // planned, p.bytes)) for p in parts]

    def _left(self, held: Iterable[Part]) -> int | None:
        """Bytes of the cap that are not reserved; None without a cap."""
        if self._cap is None:
            return None
        return max(0, self._cap - sum(part.bytes for part in held))

    def _unreserved(self, device: Device, held: Sequence[Part]) -> int:
        """Bytes of a device that are not reserved, in its memory and in the host's."""
        by_unit = _by_unit(held)
        room = device.total - by_unit[device.unit]
        if device.in_host:
            taken = sum(max(0, size - self._alone[unit]) for unit, size in by_unit.items())
            alone = max(0, self._alone[device.unit] - by_unit[device.unit])
            room = min(room, self.hardware.memories.host.total - taken + alone)
        left = self._left(held)
        return max(0, room if left is None else min(room, left))


def as_proto(device: Device, usable: int) -> node_pb2.Device:
    """A device as NodeInfo describes it."""
    return node_pb2.Device(
        engine=device.engine,
        name=device.name,
        description=device.description,
        kind=device.kind,
        backend=device.backend,
        total_memory=device.total,
        usable_memory=usable,
        bandwidth=device.bandwidth,
        bandwidth_measured=device.bandwidth_measured,
    )


def _by_unit(parts: Iterable[Part]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for part in parts:
        sizes[part.device.unit] += part.bytes
    return sizes


def _named(name: str, devices: dict[str, Device]) -> Device:
    if name not in devices:
        raise InputError(f"device {shown(name)}: this machine offers {', '.join(devices)}")
    return devices[name]
