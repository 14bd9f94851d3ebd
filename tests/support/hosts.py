"""Machines that are not at hand, as trees of files and answers of commands."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from node.agent import cards
from node.agent.commands import Runner
from node.agent.engine_devices import ANSWER
from node.agent.host_memory import GIB
from node.agent.probe import Hardware, probe
from node.ggml.library import Listed

STRIX = "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S"
NVIDIA_SMI = " ".join(cards.NVIDIA_SMI)


OF_CPU = Listed("CPU", "what it is", "cpu", "", 64 * GIB, 64 * GIB)


def linux(
    root: Path, chip: str = "Some CPU", total: int = 128 * GIB, available: int = 120 * GIB
) -> Path:
    write(root, "proc/cpuinfo", f"processor\t: 0\nmodel name\t: {chip}\n")
    write(
        root, "proc/meminfo", f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB"
    )
    return root


def write(root: Path, path: str, text: str | int) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def commands(
    mlx: str | None,
    gpus: Sequence[dict[str, Any]] = (),
    ggml: Sequence[Listed] | None = None,
    **answers: str,
) -> Runner:
    """Answers commands by their first word; child processes say backend `mlx`, devices `ggml`."""
    facts = list(gpus) or [{}] * (mlx not in (None, "cpu"))
    of_mlx = None if mlx is None else answer({"backend": mlx, "gpus": facts})
    of_ggml = None if ggml is None else answer([asdict(d) for d in (*ggml, OF_CPU)])

    def run(command: Sequence[str]) -> str | None:
        if command[0] == sys.executable:
            return of_ggml if "ggml" in command[-1] else of_mlx
        return answers.get(" ".join(command), answers.get(command[0]))

    return run


def answer(facts: Any) -> str:
    """Output of a child process, with what a library says before and after."""
    return f"ggml: hello\n{ANSWER}{json.dumps(facts)}\nbye\n"


def look(root: Path, run: Runner, cap: int | None = None) -> Hardware:
    return probe(cap, root=root, run=run, system="linux")


RADV = Listed(
    "Vulkan0", "Radeon 8060S Graphics (RADV STRIX_HALO)", "igpu", "", 100 * GIB, 112 * GIB
)


def strix_halo(
    root: Path, *, carved: int = 32 * GIB, gtt: int = 80 * GIB, available: int = 90 * GIB
) -> Path:
    """128 GiB, of which the firmware gave `carved` to the GPU; GTT maps up to `gtt` of the rest."""
    linux(root, STRIX, total=128 * GIB - carved, available=available)
    amd_card(root, "card1", carved, gtt, pci="0000:c4:00.0")
    write(root, "sys/class/drm/card1-DP-1/status", "connected")
    return root


def amd_card(root: Path, name: str, vram: int, gtt: int, pci: str = "") -> None:
    """A GPU of amdgpu, of which 1 GiB of `vram` and 2 GiB of `gtt` are used, if it has so much."""
    folder = f"sys/class/drm/{name}/device"
    used = {"vram": min(vram, GIB), "gtt": 2 * GIB}
    for memory, size in {"vram": vram, "gtt": gtt}.items():
        write(root, f"{folder}/mem_info_{memory}_total", size)
        write(root, f"{folder}/mem_info_{memory}_used", used[memory])
    if pci:
        write(root, f"{folder}/uevent", f"DRIVER=amdgpu\nPCI_SLOT_NAME={pci}")
