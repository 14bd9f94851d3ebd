"""Probes this machine: its chip, and the devices of its engines with their memory and bandwidth."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from node.agent.chips import known_bandwidth
from node.agent.commands import Runner, run_command
from node.agent.devices import Device, Memories, Reading, offered
from node.agent.engine_devices import ask_ggml, ask_mlx, ggml_devices, mlx_devices
from node.agent.host_memory import GIB, MIB, LinuxMemory, MacMemory, read_text


@dataclass(frozen=True)
class Hardware:
    """Memory is in bytes, bandwidth in bytes per second.

    devices: those that it offers, an engine's fastest first. The figures of the machine are those
    of MLX's device, or of ggml's first without MLX; total_memory: all of the host's memory, or of
    a card's if MLX computes on that.
    """

    chip: str
    backend: str  # metal, cuda, cpu, none (no MLX); rocm where such a build of MLX is installed
    platform: str
    total_memory: int
    usable_memory: int  # bytes for stages when it was probed, the cap included
    bandwidth: float
    bandwidth_measured: bool
    memories: Memories = field(repr=False, compare=False)
    devices: tuple[Device, ...] = ()
    found: tuple[Device, ...] = ()  # those that it could offer

    @property
    def engines(self) -> list[str]:
        """Names of the engines that it offers."""
        return list(dict.fromkeys(device.engine for device in self.devices))

    @property
    def ggml_backend(self) -> str:
        """cpu, vulkan, rocm, cuda, metal; empty: there is no llama.cpp."""
        return next((d.backend for d in self.found if d.engine == "ggml"), "")

    @property
    def ggml_bandwidth(self) -> float:
        """Bytes per second of ggml's fastest device."""
        return max((d.bandwidth for d in self.found if d.engine == "ggml"), default=0.0)

    def of(self, engine: str) -> list[Device]:
        """The devices of one engine, the fastest first."""
        return [device for device in self.devices if device.engine == engine]

    def with_measured(self, bandwidth: float) -> "Hardware":
        """The machine with another bandwidth of the devices that have a measured one."""

        def changed(devices: Sequence[Device]) -> tuple[Device, ...]:
            rates = [bandwidth if d.bandwidth_measured else d.bandwidth for d in devices]
            both = zip(devices, rates, strict=True)
            return tuple(_in_order([replace(d, bandwidth=rate) for d, rate in both]))

        return replace(
            self,
            bandwidth=bandwidth if self.bandwidth_measured else self.bandwidth,
            found=changed(self.found),
            devices=changed(self.devices),
        )

    def read(self, reserved: Mapping[str, int] | None = None) -> Reading:
        """Free memory now; cheap: every few seconds. reserved: see Memories.read."""
        return self.memories.read(self.devices, reserved or {})

    def available(self) -> int:
        """Bytes that new stages of its first engine could take now; no cap."""
        if not self.devices:
            return 0
        return sum(self.read().usable(self.of(self.engines[0])))

    def offering(self, engine: str = "auto", names: Sequence[str] = ()) -> "Hardware":
        """The machine with one of its engines, or all (auto), on the devices of these names.

        Raises InputError for a device that is not there.
        """
        found = tuple(d for d in self.found if engine in ("auto", d.engine))
        return replace(self, found=found, devices=tuple(_in_order(offered(found, names))))


def _in_order(devices: Sequence[Device]) -> list[Device]:
    """MLX's devices and then ggml's, the fastest first."""
    return sorted(devices, key=lambda d: (d.engine != "mlx", -d.bandwidth, d.name))


def probe(
    memory_cap: int | None = None,
    *,
    root: Path = Path("/"),
    run: Runner | None = None,
    system: str = sys.platform,
) -> Hardware:
    """Probes this machine. Takes a second or two, and an unknown chip is no error.

    `root`, `run` and `system` stand for the file system, its commands and `sys.platform`.
    """
    run = run or run_command
    mlx = ask_mlx(run)
    host = MacMemory(run) if system == "darwin" else LinuxMemory(root)
    memories = Memories(host, root, run)
    cpu, gpu_cores = _mac_chip(run) if system == "darwin" else (_cpu_name(root), 0)
    found = [*mlx_devices(mlx, memories, cpu), *ggml_devices(ask_ggml(run), memories, cpu)]
    of_chip = known_bandwidth(cpu, gpu_cores)
    measured = cache(lambda: measure_bandwidth(host.free()))
    found = [_with_bandwidth(device, of_chip, measured) for device in found]
    first = next(iter(_in_order(offered(found))), None)
    of_card = first is not None and (first.kind == "gpu" or first.backend == "cuda")
    chip = first.description if first is not None and of_card else cpu
    alone = {d.unit: d.alone for d in found if d.in_host}
    total = host.total + sum(alone.values())
    hardware = Hardware(
        chip=chip,
        backend=mlx.backend,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        total_memory=first.total if first is not None and not first.in_host else total,
        usable_memory=0,
        bandwidth=first.bandwidth if first is not None else of_chip or measured(),
        bandwidth_measured=first.bandwidth_measured if first is not None else of_chip is None,
        memories=memories,
        found=tuple(found),
    ).offering()
    available = hardware.available()
    return replace(
        hardware, usable_memory=available if memory_cap is None else min(available, memory_cap)
    )


def _with_bandwidth(device: Device, of_chip: float | None, measured: Callable[[], float]) -> Device:
    """The device with the bandwidth that its maker states, or else that of the host's memory.

    The table says what a GPU reaches. On the CPU an engine gets only what the cores reach, and on
    an APU that is about half. A card that is not in the table is no slower than the host.
    """
    known = None
    if device.kind != "cpu":
        known = (of_chip if device.kind == "igpu" else None) or known_bandwidth(device.description)
    bandwidth = known or measured()
    return replace(device, bandwidth=bandwidth, bandwidth_measured=known is None)


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


def _mac_chip(run: Runner) -> tuple[str, int]:
    """Name of a Mac's chip, and how many GPU cores it has; 0 unknown."""
    chip = (run(["sysctl", "-n", "machdep.cpu.brand_string"]) or "unknown chip").strip()
    cores = re.search(r'"gpu-core-count" = (\d+)', run(["ioreg", "-rc", "AGXAccelerator"]) or "")
    return chip, int(cores[1]) if cores else 0


def _cpu_name(root: Path) -> str:
    names = re.search(r"^model name\s*: (.+)", read_text(root / "proc/cpuinfo"), re.M)
    board = read_text(root / "proc/device-tree/model").strip("\0")
    name = names[1] if names else board or f"{platform.machine()} CPU"
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|\bw/ .*|\bwith .*", " ", name)).strip()
