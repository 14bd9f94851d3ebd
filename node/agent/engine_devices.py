"""Devices as MLX and llama.cpp list them, each engine asked in a child process."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from node.agent.cards import normal_pci
from node.agent.commands import Runner
from node.agent.devices import Device, Memories
from unicluster.program import ROOT, code_command

# Begins the line of an answer.
ANSWER = "unicluster: "
# Run in a child process: the agent itself never imports MLX, nor loads a GPU's library.
_MLX_PROGRAM = f"""
import json
import mlx.core as mx
names = [n for n in ("metal", "cuda", "rocm") if hasattr(mx, n) and getattr(mx, n).is_available()]
count = mx.device_count(mx.gpu) if names else 0
gpus = [mx.device_info(mx.Device(mx.gpu, number)) for number in range(count)]
backend = names[0] if names else "cpu"
print({ANSWER!r} + json.dumps(dict(backend=backend, gpus=gpus)), flush=True)
"""

_GGML_PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict
from node.ggml.library import devices
print({ANSWER!r} + json.dumps([asdict(device) for device in devices()]), flush=True)
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
class MlxAnswer:
    """MLX's backend (none: it is not installed), and what it says of each GPU."""

    backend: str
    gpus: tuple[dict[str, Any], ...] = ()


def ask_mlx(run: Runner) -> MlxAnswer:
    """MLX's answer, from a child process."""
    facts = _answer(run, _MLX_PROGRAM)
    if not isinstance(facts, dict):
        return MlxAnswer("none")
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
    listed = _answer(run, _GGML_PROGRAM)
    return listed if isinstance(listed, list) else []


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


def _answer(run: Runner, program: str) -> Any:
    """The JSON that a program prints in one line, among what its libraries print; None without."""
    for line in (run(code_command(program)) or "").splitlines():
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    return None


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
