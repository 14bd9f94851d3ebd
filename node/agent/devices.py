"""Devices that the engines of this machine compute on, and the memory that each of them reaches.

Engines are asked in child processes; what changes is read from the operating system, because that
is cheap and counts what other programs take.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from node.agent.cards import AmdGpu, NvidiaGpu, amd_gpus, normal_pci, nvidia_gpus
from node.agent.commands import Runner
from node.agent.host_memory import HostMemory, reserve
from unicluster.errors import InputError
from unicluster.program import ROOT, code_command

Kind = Literal["gpu", "igpu", "cpu"]

# Run in a child process: the agent itself never imports MLX, nor loads a GPU's library.
_MLX_PROGRAM = """
import json
import mlx.core as mx
names = [n for n in ("metal", "cuda", "rocm") if hasattr(mx, n) and getattr(mx, n).is_available()]
count = mx.device_count(mx.gpu) if names else 0
gpus = [mx.device_info(mx.Device(mx.gpu, number)) for number in range(count)]
print(json.dumps({"backend": names[0] if names else "cpu", "gpus": gpus}))
"""

_GGML_PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict
from node.ggml.library import devices
print(json.dumps([asdict(device) for device in devices()]))
"""
# Beginnings of the names of ggml's devices, and the backends that they belong to.
_GGML_BACKENDS = {
    "Vulkan": "vulkan",
    "ROCm": "rocm",
    "CUDA": "cuda",
    "Metal": "metal",
    "MTL": "metal",
}
_MLX_NAMES = {"metal": "Metal", "cuda": "CUDA", "rocm": "ROCm"}
# Vulkan on the CPU, which calls itself a GPU.
_SOFTWARE = "llvmpipe"


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


@dataclass(frozen=True)
class Free:
    """Bytes that are free for a device: of its memory alone, and of the host's."""

    alone: int
    shared: int


@dataclass(frozen=True)
class MlxAnswer:
    """MLX's backend (none: it is not installed), and what it says of each GPU."""

    backend: str
    gpus: tuple[dict[str, Any], ...] = ()


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


def ask_mlx(run: Runner) -> MlxAnswer:
    """MLX's answer, from a child process."""
    answer = run(code_command(_MLX_PROGRAM))
    if answer is None:
        return MlxAnswer("none")
    facts = json.loads(answer.splitlines()[-1])
    return MlxAnswer(facts["backend"], tuple(facts["gpus"]))


def mlx_devices(answer: MlxAnswer, memories: Memories, chip: str) -> list[Device]:
    """Devices of MLX: its GPUs, the one that it computes on by itself first, or the cores."""
    if answer.backend == "none":
        return []
    host, devices = memories.host.total, list[Device]()
    name = _MLX_NAMES.get(answer.backend, "")
    for number, facts in enumerate(answer.gpus if name else ()):
        gpu = Device("mlx", f"{name}{number}", chip, "igpu", answer.backend, host)
        if answer.backend == "metal":
            # Without an answer: by default Metal allows the GPU about three quarters.
            limit = facts.get("max_recommended_working_set_size") or host * 3 // 4
            devices.append(replace(gpu, name=name, total=min(host, int(limit)), unit="gpu"))
        elif answer.backend == "cuda":
            total = int(facts.get("total_memory") or facts.get("memory_size") or 0)
            reported = replace(
                gpu,
                description=str(facts.get("device_name", "NVIDIA GPU")),
                total=total,
                reported_free=int(facts.get("free_memory") or total),
                uuid=str(facts.get("uuid", "")),
            )
            devices.append(_on_nvidia(reported, number, memories))
        else:
            described = str(facts.get("device_name", chip))
            devices.append(_on_amd(replace(gpu, description=described), memories))
    return devices or [Device("mlx", "CPU", chip, "cpu", "cpu", host)]


def ask_ggml(run: Runner) -> list[dict[str, Any]]:
    """llama.cpp's devices, from a child process, as `node.ggml.library.Listed`; none without it."""
    answer = run(code_command(_GGML_PROGRAM))
    listed: list[dict[str, Any]] = [] if answer is None else json.loads(answer.splitlines()[-1])
    return listed


def ggml_devices(listed: Iterable[dict[str, Any]], memories: Memories, chip: str) -> list[Device]:
    """Devices of llama.cpp, GPUs first, the cores last.

    A GPU that two of its backends reach is listed once.
    """
    host, devices, seen = memories.host.total, list[Device](), set[str]()
    for row in listed:
        name, kind = str(row["name"]), str(row["kind"])
        if kind not in ("gpu", "igpu"):
            continue
        pci = normal_pci(str(row["pci"]))
        backend = next((b for start, b in _GGML_BACKENDS.items() if name.startswith(start)), "gpu")
        description = str(row["description"])
        total, free = int(row["total"]), int(row["free"])
        if pci and pci in seen:
            continue
        seen.add(pci)
        gpu = Device("ggml", name, description, "gpu", backend, total, pci=pci, reported_free=free)
        if _SOFTWARE in description:
            devices.append(replace(gpu, description=chip, kind="cpu", total=min(host, total)))
        elif backend == "metal":
            gpu = replace(gpu, description=chip, kind="igpu", total=min(host, total), unit="gpu")
            devices.append(gpu)
        elif _is_nvidia(gpu):
            number = sum(d.backend == backend for d in devices)
            devices.append(_on_nvidia(gpu, number, memories))
        elif kind == "igpu":
            devices.append(_on_amd(gpu, memories))
        else:
            unit = pci or f"{backend} {name}"
            devices.append(replace(_with_pci(gpu, memories), alone=total, unit=unit))
    if any(row["kind"] == "cpu" for row in listed):
        devices.append(Device("ggml", "CPU", chip, "cpu", "cpu", host))
    return devices


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


def _is_nvidia(device: Device) -> bool:
    return device.backend == "cuda" or "nvidia" in device.description.lower()


def _on_nvidia(device: Device, number: int, memories: Memories) -> Device:
    """The device with the memory of its GPU, which is a card, or shares the host's memory."""
    gpus = memories.nvidia()
    matching = [g for g in gpus if g.pci == device.pci or (g.uuid and g.uuid == device.uuid)]
    gpu = next(iter(matching or gpus[number : number + 1]), None)
    if gpu is None:
        unit = device.pci or f"nvidia{number}"
        return replace(device, kind="gpu", alone=device.total, unit=unit)
    found = replace(device, description=gpu.name, pci=gpu.pci, uuid=gpu.uuid, unit=gpu.pci)
    if gpu.total is None:
        host = memories.host.total
        return replace(found, kind="igpu", total=min(device.total or host, host), alone=0)
    total = min(device.total or gpu.total, gpu.total)
    return replace(found, kind="gpu", total=total, alone=total)


def _on_amd(device: Device, memories: Memories) -> Device:
    """A GPU in the host's memory, with what is carved out for it and what it may map besides."""
    host = memories.host.total
    device = _with_pci(replace(device, kind="igpu"), memories)
    gpu = next((gpu for gpu in memories.amd() if gpu.pci == device.pci), None)
    if gpu is None:
        total = min(device.total or host, host)
        return replace(device, total=total, alone=0, unit=device.pci or "gpu")
    reach = gpu.vram_total + min(gpu.gtt_total, host)
    # ROCm takes either what is carved out or what is mapped; llama.cpp's total says so.
    total = min(reach, device.total) if device.engine == "ggml" and device.total else reach
    alone = min(gpu.vram_total, total)
    if device.backend == "rocm" and total < reach and gpu.vram_total < gpu.gtt_total:
        alone = 0
    return replace(device, total=total, alone=alone, unit=gpu.pci or "gpu")


def _with_pci(device: Device, memories: Memories) -> Device:
    """The device with the address of the one AMD GPU that it can be, where it states none."""
    gpus = memories.amd()
    if device.pci or len(gpus) != 1:
        return device
    return replace(device, pci=gpus[0].pci)
