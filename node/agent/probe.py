"""Probes this machine: chip, MLX backend, memory, and memory bandwidth."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from node.agent.chips import known_bandwidth
from unicluster.program import ROOT, child_environment, code_command

GIB = 1 << 30
MIB = 1 << 20

# Runs a command and returns what it prints, or None when it is missing or fails.
Runner = Callable[[Sequence[str]], str | None]

# Run in a child process: the agent itself never imports MLX.
_MLX_PROGRAM = """
import json
import mlx.core as mx
names = [n for n in ("metal", "cuda", "rocm") if hasattr(mx, n) and getattr(mx, n).is_available()]
print(json.dumps({"backend": names[0] if names else "cpu", "device": mx.device_info()}))
"""

_GGML_PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from node.ggml.library import devices
print(json.dumps(devices()))
"""
# Beginnings of the names of ggml's devices, and the backends that they belong to.
_GGML_BACKENDS = {
    "Vulkan": "vulkan",
    "ROCm": "rocm",
    "CUDA": "cuda",
    "Metal": "metal",
    "MTL": "metal",
}


@dataclass(frozen=True)
class Hardware:
    """Memory is in bytes, bandwidth in bytes per second."""

    chip: str
    backend: str  # metal, cuda, cpu, none (no MLX); rocm where such a build of MLX is installed
    platform: str
    total_memory: int
    usable_memory: int  # bytes for stages when it was probed, the cap included
    bandwidth: float
    bandwidth_measured: bool
    _available: Callable[[], int] = field(repr=False, compare=False)
    ggml_backend: str = ""  # cpu, vulkan, rocm, cuda, metal; empty: there is no llama.cpp
    ggml_bandwidth: float = 0.0
    only: str = ""  # the one engine that it is to offer; empty: all

    @property
    def engines(self) -> list[str]:
        """Names of the engines that it offers."""
        installed = ["mlx"] * (self.backend != "none") + ["ggml"] * bool(self.ggml_backend)
        return [engine for engine in installed if self.only in ("", engine)]

    def available(self) -> int:
        """Bytes that new stages could take now; no cap. Cheap: call it every few seconds."""
        return self._available()


def probe(
    memory_cap: int | None = None,
    *,
    root: Path = Path("/"),
    run: Runner | None = None,
    system: str = sys.platform,
) -> Hardware:
    """Probes this machine. Takes a second at most, and an unknown chip is no error.

    `root`, `run` and `system` stand for the file system, its commands and `sys.platform`.
    """
    run = run or run_command
    mlx = _ask_mlx(run)
    machine = _Mac(run, mlx) if system == "darwin" else _Linux(root, run, mlx)
    available = machine.available()
    # The table says what a GPU reaches. MLX on the CPU gets only what the cores reach, and
    # on an APU that is about half.
    of_chip = known_bandwidth(machine.chip, machine.gpu_cores)
    known = None if mlx.backend == "cpu" else of_chip
    bandwidth = known or measure_bandwidth(available)
    ggml = _ask_ggml(run)
    return Hardware(
        chip=machine.chip,
        backend=mlx.backend,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        total_memory=machine.total,
        usable_memory=available if memory_cap is None else min(available, memory_cap),
        bandwidth=bandwidth,
        bandwidth_measured=known is None,
        _available=machine.available,
        ggml_backend=ggml,
        ggml_bandwidth=of_chip or bandwidth if ggml not in ("", "cpu") else bandwidth,
    )


def run_command(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, env=child_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def measure_bandwidth(available: int = GIB) -> float:
    """Bytes read plus bytes written per second by a copy on all cores, the best of three.

    Takes up to 256 MiB, more than any cache, or a quarter of `available`.
    """
    threads = min(8, os.cpu_count() or 1)
    size = max(MIB, min(128 * MIB, available // 8))
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):  # the first one also pays for the pages of the target
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            best = min(best, time.perf_counter() - start)
    return 2 * size / best


@dataclass(frozen=True)
class _Mlx:
    """MLX's backend and memory limit, from a child process."""

    backend: str
    working_set: int | None  # bytes that Metal recommends to keep in use at once


def _ask_mlx(run: Runner) -> _Mlx:
    answer = run(code_command(_MLX_PROGRAM))
    if answer is None:
        return _Mlx("none", None)
    facts = json.loads(answer.splitlines()[-1])
    return _Mlx(facts["backend"], facts["device"].get("max_recommended_working_set_size"))


def _ask_ggml(run: Runner) -> str:
    """The backend of ggml here, from a child process; empty when ggml is not installed."""
    answer = run(code_command(_GGML_PROGRAM))
    if answer is None:
        return ""
    names = [name for name, _ in json.loads(answer.splitlines()[-1])]
    backends = (
        b for name in names for start, b in _GGML_BACKENDS.items() if name.startswith(start)
    )
    return next(backends, "cpu")


class _Mac:
    def __init__(self, run: Runner, mlx: _Mlx) -> None:
        self._run = run
        self.chip = (run(["sysctl", "-n", "machdep.cpu.brand_string"]) or "unknown chip").strip()
        self.total = int(run(["sysctl", "-n", "hw.memsize"]) or 0)
        cores = re.search(
            r'"gpu-core-count" = (\d+)', run(["ioreg", "-rc", "AGXAccelerator"]) or ""
        )
        self.gpu_cores = int(cores[1]) if cores else 0
        # Without MLX to ask: by default Metal allows the GPU about three quarters.
        self._limit = mlx.working_set or self.total * 3 // 4

    def available(self) -> int:
        """Bytes that are free or can be freed at once, within Metal's working set."""
        text = self._run(["vm_stat"]) or ""
        page = re.search(r"page size of (\d+) bytes", text)
        if page is None:
            return self._limit
        kinds = "free|inactive|speculative|purgeable"
        pages = sum(int(count) for count in re.findall(rf"Pages (?:{kinds}): +(\d+)", text))
        return min(self._limit, pages * int(page[1]))


class _Linux:
    def __init__(self, root: Path, run: Runner, mlx: _Mlx) -> None:
        self._root = root
        self._run = run
        self._backend = mlx.backend
        self.gpu_cores = 0
        self._gpu = _nvidia(run) if mlx.backend == "cuda" else None
        self.chip = self._gpu.name if self._gpu else self._cpu_name()
        self.total = self._total()

    def available(self) -> int:
        """Bytes that MLX's backend can still reach, less a reserve for all else.

        The reserve is 2 GiB or 5 % of the memory, whichever is more: the desktop, the page cache
        that weights are read through, and MLX's own scratch. A machine with little memory left
        keeps back only a quarter of that, so that it can still take a few layers.
        """
        free = self._free()
        return free - min(max(2 * GIB, self.total // 20), free // 4)

    def _total(self) -> int:
        if self._gpu and self._gpu.total is not None:
            return self._gpu.total
        total = min([self._meminfo()["MemTotal"], *(limit for limit, _ in self._cgroups())])
        if self._backend == "rocm":
            total += sum(card.vram_total for card in self._amd_cards())
        return total

    def _free(self) -> int:
        if self._gpu and self._gpu.total is not None:
            gpu = _nvidia(self._run)
            return gpu.free if gpu and gpu.free is not None else 0
        # A card that shares the host's memory (GB10) reports no numbers.
        free = min([self._meminfo()["MemAvailable"], *(room for _, room in self._cgroups())])
        if self._backend == "rocm":
            # An APU's GPU reaches the part of host memory that GTT maps, and what the firmware
            # has carved out for it, which Linux does not count.
            cards = self._amd_cards()
            free = min(free, sum(card.gtt_free for card in cards))
            free += sum(card.vram_free for card in cards)
        return max(0, free)

    def _meminfo(self) -> dict[str, int]:
        """Bytes by name, from /proc/meminfo."""
        lines = (self._root / "proc/meminfo").read_text().splitlines()
        fields = (line.split() for line in lines)
        return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}

    def _cgroups(self) -> list[tuple[int, int]]:
        """(limit, bytes still free) of this process's control group and those around it (v2)."""
        groups = self._root / "proc/self/cgroup"
        lines = groups.read_text().splitlines() if groups.exists() else []
        path = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
        folder = self._root / "sys/fs/cgroup" / path
        limits = []
        for group in [folder, *folder.parents[: len(Path(path).parts)]]:
            limit = _read(group / "memory.max")
            if limit.isdigit():
                used = int(_read(group / "memory.current") or 0)
                cached = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.M)
                limits.append((int(limit), int(limit) - used + (int(cached[1]) if cached else 0)))
        return limits

    def _cpu_name(self) -> str:
        names = re.search(r"^model name\s*: (.+)", _read(self._root / "proc/cpuinfo"), re.M)
        board = _read(self._root / "proc/device-tree/model").strip("\0")
        name = names[1] if names else board or f"{platform.machine()} CPU"
        return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|\bw/ .*|\bwith .*", " ", name)).strip()

    def _amd_cards(self) -> list["_AmdCard"]:
        folders = (self._root / "sys/class/drm").glob("card[0-9]*/device")
        return [
            _AmdCard(
                vram_total=int(_read(folder / "mem_info_vram_total")),
                vram_free=int(_read(folder / "mem_info_vram_total"))
                - int(_read(folder / "mem_info_vram_used")),
                gtt_free=int(_read(folder / "mem_info_gtt_total"))
                - int(_read(folder / "mem_info_gtt_used")),
            )
            for folder in sorted(folders)
            if (folder / "mem_info_gtt_total").exists()
        ]


@dataclass(frozen=True)
class _AmdCard:
    vram_total: int
    vram_free: int
    gtt_free: int


@dataclass(frozen=True)
class _NvidiaCard:
    name: str
    total: int | None  # None: it shares the host's memory
    free: int | None


def _nvidia(run: Runner) -> _NvidiaCard | None:
    """The first NVIDIA card, which is the one that MLX uses; None without one."""
    query = "--query-gpu=name,memory.total,memory.free"
    answer = run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    if not answer:
        return None
    name, total, free = (part.strip() for part in answer.splitlines()[0].rsplit(",", 2))
    if not total.isdigit():
        return _NvidiaCard(name, None, None)
    return _NvidiaCard(name, int(total) * MIB, int(free) * MIB)


def _read(path: Path) -> str:
    """Text of a small file of the kernel, or "" where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
