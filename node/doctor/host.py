"""Checks of `unicluster doctor` on the machine itself: memory, sleep, swap, firewall, clock."""

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from node.agent.commands import Runner, run_command
from node.agent.host_memory import GIB
from node.doctor import gpu_memory, processors
from node.doctor.disk import models_disk
from node.doctor.finding import Finding, Level
from unicluster.program import code_command
from unicluster.units import format_bytes

# A clock that shows an earlier time is wrong.
EARLIEST = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, 0))
SWAPPED = 0.02  # of the memory
SOCKET_FILTER = "/usr/libexec/ApplicationFirewall/socketfilterfw"
# TCP: the agent and its stage worker.
PORTS = (47600, 47601)


def examine(
    root: Path = Path("/"), run: Runner = run_command, system: str = sys.platform
) -> list[Finding]:
    """`root`, `run` and `system` stand for the file system, its commands and `sys.platform`."""
    of_system = _mac(run) if system == "darwin" else _linux(root, run)
    swapped, used = swap(psutil.swap_memory().used), processors.cores(processors.measured())
    return [_mlx(run), _clock(time.time()), swapped, used, models_disk(), *of_system]


def swap(used: int, total: int | None = None) -> Finding:
    """Finding about `used` bytes of swap, of `total` bytes of memory (default: this machine's)."""
    total = psutil.virtual_memory().total if total is None else total
    if used <= SWAPPED * total:
        return Finding(Level.OK, "swap", "next to nothing is swapped out")
    return Finding(
        Level.WARNING,
        "swap",
        f"{format_bytes(used)} are swapped out: weights read from disk are a hundred times slower",
        "close what else needs memory, or offer less with `join --memory`",
    )


def _clock(now: float) -> Finding:
    if now > EARLIEST:
        return Finding(Level.OK, "clock", time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now)))
    return Finding(
        Level.ERROR,
        "clock",
        f"it says {time.strftime('%Y-%m-%d', time.localtime(now))}: certificates won't be valid",
        "set the clock; switch on NTP",
    )


def _mlx(run: Runner) -> Finding:
    answer = run(code_command("import mlx.core, mlx_lm; print(mlx_lm.__version__)"))
    if answer is not None:
        return Finding(Level.OK, "mlx", f"mlx-lm {answer.split()[-1]}")
    extra = "cuda" if shutil.which("nvidia-smi") else "cpu"
    remedy = f"pip install 'unicluster[{extra}]', unless it is only to coordinate or chat"
    return Finding(Level.WARNING, "mlx", "not installed: this machine can't compute stages", remedy)


def _mac(run: Runner) -> Iterator[Finding]:
    total = int(run(["sysctl", "-n", "hw.memsize"]) or 0)
    limit = int(run(["sysctl", "-n", "iogpu.wired_limit_mb"]) or 0)
    if limit == 0 and total >= 32 * GIB:
        suggested = (total - 8 * GIB) // (1 << 20)
        yield Finding(
            Level.WARNING,
            "memory",
            "Metal may wire about three quarters of the memory",
            f"`sudo sysctl iogpu.wired_limit_mb={suggested}` gives it all but 8 GiB, until the "
            "next boot; the playbook keeps it (host_wired_limit_mb)",
        )
    else:
        shown = f"{limit} MB" if limit else "the system's own"
        yield Finding(Level.OK, "memory", f"limit of wired memory: {shown}")
    asleep = re.search(r"^\s*sleep\s+([1-9]\d*)", run(["pmset", "-g", "custom"]) or "", re.M)
    if asleep:
        yield Finding(
            Level.WARNING,
            "sleep",
            f"this Mac sleeps after {asleep[1]} minutes without a stage, "
            "and leaves the cluster then",
            "sudo pmset -a sleep 0",
        )
    else:
        yield Finding(Level.OK, "sleep", "never")
    if "enabled" in (run([SOCKET_FILTER, "--getglobalstate"]) or ""):
        yield Finding(
            Level.WARNING,
            "firewall",
            "on: macOS asks once whether Python may accept connections",
            f"sudo {SOCKET_FILTER} --unblockapp {Path(sys.executable).resolve()}",
        )
    else:
        yield Finding(Level.OK, "firewall", "off")


def _linux(root: Path, run: Runner) -> Iterator[Finding]:
    yield _linux_sleep(run)
    yield _linux_firewall(root, run)
    yield from gpu_memory.examine(root, run)


def _linux_sleep(run: Runner) -> Finding:
    if "graphical" not in (run(["systemctl", "get-default"]) or ""):
        return Finding(Level.OK, "sleep", "no desktop that would put this machine to sleep")
    # is-enabled fails for a masked unit, so it is asked for by show.
    state = run(["systemctl", "show", "--property=LoadState", "sleep.target"]) or ""
    if "masked" in state:
        return Finding(Level.OK, "sleep", "never")
    return Finding(
        Level.WARNING,
        "sleep",
        "the desktop may put this machine to sleep while it has no stage, and it leaves the "
        "cluster then",
        "sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target",
    )


def _linux_firewall(root: Path, run: Runner) -> Finding:
    if (run(["systemctl", "is-active", "firewalld"]) or "").strip() == "active":
        opened = run(["firewall-cmd", "--list-services", "--list-ports"]) or ""
        remedy = "sudo firewall-cmd --permanent --add-service=mdns " + " ".join(
            f"--add-port={port}/tcp" for port in PORTS
        )
        if "unicluster" in opened or all(f"{port}/tcp" in opened for port in PORTS):
            return Finding(Level.OK, "firewall", "firewalld is on, and open for unicluster")
        remedy += " && sudo firewall-cmd --reload"
        return Finding(
            Level.ERROR, "firewall", "firewalld is on, and not open for unicluster", remedy
        )
    try:
        settings = (root / "etc/ufw/ufw.conf").read_text()
    except OSError:
        return Finding(Level.OK, "firewall", "neither firewalld nor ufw is on")
    if not re.search(r"^ENABLED=yes", settings, re.M):
        return Finding(Level.OK, "firewall", "ufw is off")
    if (root / "etc/ufw/applications.d/unicluster").exists():
        return Finding(Level.OK, "firewall", "ufw is on, and knows unicluster")
    return Finding(
        Level.WARNING,
        "firewall",
        "ufw is on; whether it is open for unicluster only root can see",
        f"sudo ufw allow {PORTS[0]}:{PORTS[1]}/tcp",
    )
