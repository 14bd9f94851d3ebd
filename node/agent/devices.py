"""Devices that the engines of this machine compute on, and the memory that each of them reaches.

What is free is read from the operating system and the drivers, because that is cheap and counts
what other programs take.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from node.agent.cards import AmdGpu, NvidiaGpu, amd_gpus, nvidia_gpus
from node.agent.commands import Runner
from node.agent.host_memory import HostMemory, reserve
from unicluster.errors import InputError

Kind = Literal["gpu", "igpu", "cpu"]


@dataclass(frozen=True)
class Device:
    """A device of one engine.

    name: as the engine calls it. backend: cpu, metal, cuda, rocm, vulkan. total: bytes that it
    reaches. alone: those of them that no device in the host's memory can take: a card's memory, or
    what the firmware has carved out for an APU. unit: the same for devices that are one piece of
    hardware. pci, uuid: of a GPU, where known. reported_free: bytes that were free when its engine
    was asked.
    bandwidth: bytes per second, measured here or nominal.
    """

    engine: str
    name: str
    description: str
    kind: Kind
    backend: str
    total: int
    alone: int = 0
    unit: str = "host"
    pci: str = ""
    uuid: str = ""
    reported_free: int = 0
    bandwidth: float = 0.0
    bandwidth_measured: bool = False

    @property
    def in_host(self) -> bool:
        """Whether it is in the host's memory, or reaches a part of that."""
        return self.total > self.alone

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a worker sees it. MLX takes the first card that it sees."""
        alone = self.engine == "mlx" and self.backend == "cuda" and self.uuid
        return {"CUDA_VISIBLE_DEVICES": self.uuid} if alone else {}


@dataclass(frozen=True)
class Free:
    """Bytes that are free for a device: of its memory alone, and of the host's."""

    alone: int
    shared: int


class Memories:
    """Memory of the host and of its GPUs, read anew by each call of `read`."""

    def __init__(self, host: HostMemory, root: Path, run: Runner) -> None:
        self.host = host
        self._root = root
        self._run = run

    def amd(self) -> list[AmdGpu]:
        """GPUs of the driver amdgpu."""
        return amd_gpus(self._root)

    def nvidia(self) -> list[NvidiaGpu]:
        """NVIDIA's GPUs."""
        return nvidia_gpus(self._run)

    def read(self, devices: Sequence[Device], reserved: Mapping[str, int]) -> "Reading":
        """Reads what is free of all that these devices are on. May run a command.

        reserved: bytes that stages hold now, by unit: they count where only the engine knows how
        much memory there is, which is not asked again.
        """
        host = self.host.free()
        amd = {gpu.pci: gpu for gpu in self.amd()}
        wants_nvidia = any(d.kind == "gpu" and d.backend in ("cuda", "vulkan") for d in devices)
        nvidia = {gpu.pci: gpu for gpu in (self.nvidia() if wants_nvidia else ())}
        free: dict[Device, Free] = {}
        for device in devices:
            shared = min(host, device.total - device.alone)
            if (gpu := amd.get(device.pci)) is not None and device.kind != "cpu":
                alone = gpu.vram_free
                shared = min(shared, gpu.gtt_free)
            elif (card := nvidia.get(device.pci)) is not None and card.free is not None:
                alone = card.free
            else:
                alone = max(0, device.reported_free - reserved.get(device.unit, 0))
            free[device] = Free(min(alone, device.alone), shared)
        return Reading(host, self.host.total, free)


@dataclass(frozen=True)
class Reading:
    """Free bytes of the host and for each device; host_total: of the host's memory."""

    host: int
    host_total: int
    free: Mapping[Device, Free]

    def with_freed(self, freed: Iterable[tuple[Device, int]]) -> "Reading":
        """As it would be with so many bytes more free of each of these devices."""
        reading = self
        for device, size in freed:
            reading = reading._with(device, size)
        return reading

    def _with(self, freed: Device, size: int) -> "Reading":
        """Memory of its own is filled first, and so is freed last."""
        shared = min(size, self.host_total - self.host) if freed.in_host else 0
        free = {
            device: Free(
                min(known.alone + size - shared, device.alone)
                if device.unit == freed.unit
                else known.alone,
                min(known.shared + shared, device.total - device.alone),
            )
            for device, known in self.free.items()
        }
        return replace(self, host=self.host + shared, free=free)

    def usable(self, devices: Sequence[Device]) -> list[int]:
        """Bytes that new stages of one engine may take on each of its devices, all at once.

        Memory of the host that several of them reach goes to the first.
        """
        host, usable = self.host, []
        for device in devices:
            alone, shared = self.free[device].alone, min(self.free[device].shared, host)
            base = device.alone + (self.host_total if device.in_host else 0)
            left = alone + shared
            if device.backend != "metal":  # whose limit leaves room for all else
                left -= reserve(left, base)
            usable.append(left)
            host -= max(0, left - alone)
        return usable


def offered(devices: Sequence[Device], chosen: Sequence[str] = ()) -> list[Device]:
    """The devices that stages are put on: the `chosen` ones by name, or all GPUs, or the cores.

    MLX computes on one, the first. Raises InputError for a name that no device has.
    """
    names = {name.lower() for name in chosen}
    if unknown := names - {device.name.lower() for device in devices}:
        there = ", ".join(dict.fromkeys(f"{d.name} ({d.description})" for d in devices))
        raise InputError(f"--device {sorted(unknown)[0]}: this machine has {there or 'none'}")
    taken: list[Device] = []
    for engine in dict.fromkeys(device.engine for device in devices):
        of_engine = [device for device in devices if device.engine == engine]
        if names:
            wanted = [device for device in of_engine if device.name.lower() in names]
        else:
            wanted = [d for d in of_engine if d.name != "CPU"] or of_engine
        taken += wanted[:1] if engine == "mlx" else wanted
    return taken
