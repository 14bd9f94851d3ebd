"""Memory of this host: what there is, and what is free, as the operating system counts it."""

import re
from pathlib import Path
from typing import Protocol

from node.agent.commands import Runner

GIB = 1 << 30
MIB = 1 << 20


class HostMemory(Protocol):
    """total: bytes of the host's memory, without what the firmware has carved out of it."""

    total: int

    def free(self) -> int:
        """Bytes that are free, or can be freed at once."""
        ...


def reserve(free: int, total: int) -> int:
    """Bytes of the free ones that stages are not to take, of a memory of `total` bytes.

    2 GiB or 5 % of the memory, whichever is more: the desktop, the page cache that weights are
    read through, and the engine's own scratch. Where little is left only a quarter of that is
    kept back, so that the machine can still take a few layers.
    """
    return min(max(2 * GIB, total // 20), free // 4)


class LinuxMemory:
    """Memory by /proc/meminfo, within the control groups of this process (v2)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.total = min([self._meminfo()["MemTotal"], *(limit for limit, _ in self._cgroups())])

    def free(self) -> int:
        """Bytes that are free, or can be freed at once."""
        rooms = (room for _, room in self._cgroups())
        return max(0, min([self._meminfo()["MemAvailable"], *rooms]))

    def _meminfo(self) -> dict[str, int]:
        """Bytes by name, from /proc/meminfo."""
        lines = (self._root / "proc/meminfo").read_text().splitlines()
        fields = (line.split() for line in lines)
        return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}

    def _cgroups(self) -> list[tuple[int, int]]:
        """(limit, bytes still free) of this process's control group and those around it."""
        groups = self._root / "proc/self/cgroup"
        lines = groups.read_text().splitlines() if groups.exists() else []
        path = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
        folder = self._root / "sys/fs/cgroup" / path
        limits = []
        for group in [folder, *folder.parents[: len(Path(path).parts)]]:
            limit = read_text(group / "memory.max")
            if limit.isdigit():
                used = int(read_text(group / "memory.current") or 0)
                stat = read_text(group / "memory.stat")
                cached = re.search(r"^inactive_file (\d+)", stat, re.M)
                limits.append((int(limit), int(limit) - used + (int(cached[1]) if cached else 0)))
        return limits


class MacMemory:
    """Memory by sysctl and vm_stat."""

    def __init__(self, run: Runner) -> None:
        self._run = run
        self.total = int(run(["sysctl", "-n", "hw.memsize"]) or 0)

    def free(self) -> int:
        """Bytes that are free, or can be freed at once; all where vm_stat does not say."""
        text = self._run(["vm_stat"]) or ""
        page = re.search(r"page size of (\d+) bytes", text)
        if page is None:
            return self.total
        kinds = "free|inactive|speculative|purgeable"
        pages = sum(int(count) for count in re.findall(rf"Pages (?:{kinds}): +(\d+)", text))
        return pages * int(page[1])


def read_text(path: Path) -> str:
    """Text of a small file of the kernel, or "" where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> int:
    """Number in a small file of the kernel; 0 where there is none."""
    text = read_text(path)
    return int(text) if text.isdigit() else 0
