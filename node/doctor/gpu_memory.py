"""Check of `unicluster doctor` on how much of an AMD APU's memory its GPU reaches.

The kernel sizes GTT, what the GPU maps of the host's memory, once at boot: by its limit of TTM,
half of the memory by default. The older amdgpu.gttsize is deprecated, and overrides that limit.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from node.agent.cards import PAGE, AmdGpu, amd_gpus, ttm_module
from node.agent.commands import Runner
from node.agent.engine_devices import ask_ggml
from node.agent.host_memory import GIB, MIB, LinuxMemory, read_text
from node.doctor.finding import Finding, Level
from unicluster.units import format_bytes

# Left to the system where the GPU maps all else: an eighth of a small memory.
MOST_KEPT = 8 * GIB
# The least that firmwares carve out, and what counts as more.
SMALLEST_CARVE_OUT = GIB // 2
LARGE_CARVE_OUT = 2 * GIB
# A GPU that reaches this part of what it could is fine.
ENOUGH = 0.85


def examine(root: Path, run: Runner) -> Iterator[Finding]:
    """A finding for the GPU of an AMD APU; none for other machines."""
    gpu = _apu(root, run)
    if gpu is None:
        return
    host = LinuxMemory(root).total
    total = host + gpu.vram_total
    reached = gpu.vram_total + min(gpu.gtt_total, host)
    message = f"{format_bytes(reached)} of {format_bytes(total)} can be mapped by the GPU"
    kept = min(MOST_KEPT, total // 8)
    if reached >= ENOUGH * (total - kept):
        yield Finding(Level.OK, "memory", message)
        return
    carved = gpu.vram_total > LARGE_CARVE_OUT
    left = SMALLEST_CARVE_OUT if carved else gpu.vram_total
    mib = (total - left - kept) // MIB
    steps = ["in the firmware carve out the least for the GPU (UMA frame buffer)"] * carved
    steps += [*_parameters(root, mib), "reboot"]
    yield Finding(
        Level.WARNING,
        "memory",
        message,
        f"raise it so: {'; '.join(steps)}. The playbook does it with host_gtt_mib: {mib}",
    )


def _apu(root: Path, run: Runner) -> AmdGpu | None:
    """The GPU that is in the host's memory, by llama.cpp's list, or else by the CPU's name."""
    gpus = amd_gpus(root)
    if not gpus:
        return None
    kinds = {str(row["pci"]): str(row["kind"]) for row in ask_ggml(run)}
    listed = [gpu for gpu in gpus if kinds.get(gpu.pci) == "igpu"]
    if listed or any(gpu.pci in kinds for gpu in gpus):
        return listed[0] if listed else None
    name = re.search(r"^model name\s*: (.+)", read_text(root / "proc/cpuinfo"), re.M)
    if name is None or "Radeon" not in name[1]:
        return None
    return gpus[-1] if len(gpus) == 1 else max(gpus, key=lambda gpu: gpu.pci)  # behind the slots


def _parameters(root: Path, mib: int) -> Iterator[str]:
    """Steps that make the kernel map so much, as this distribution does it."""
    module, _ = ttm_module(root)
    pages = mib * MIB // PAGE
    parameters = f"{module}.pages_limit={pages} {module}.page_pool_size={pages}"
    old = re.findall(r"\bamdgpu\.gttsize=-?\d+", read_text(root / "proc/cmdline"))
    if any((root / path).exists() for path in ("usr/sbin/grubby", "usr/bin/grubby", "sbin/grubby")):
        removed = " --remove-args=amdgpu.gttsize" * bool(old)
        yield f"sudo grubby --update-kernel=ALL{removed} --args='{parameters}'"
        return
    if old:
        yield f"take {old[0]} out of the kernel's parameters: it is deprecated, and overrides this"
    if (root / "etc/default/grub").exists():
        line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {parameters}"'
        yield f"put {line} into /etc/default/grub.d/unicluster.cfg"
        yield "sudo update-grub"
    else:
        yield f"boot with the kernel parameters {parameters}"
