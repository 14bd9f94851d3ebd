"""Temperature and power of a machine, where the platform reports them to ordinary users."""

import sys
from dataclasses import dataclass
from pathlib import Path

from node.agent.commands import Runner, run_command

# Sensors of the processor or the GPU, not of a disk or a network card.
_CHIPS = ("coretemp", "k10temp", "zenpower", "amdgpu", "cpu_thermal", "soc_thermal", "acpitz")
_NVIDIA = ("nvidia-smi", "--query-gpu=temperature.gpu,power.draw", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Thermals:
    """Readings, None where the platform does not report them; macOS does only to root."""

    celsius: float | None  # of the hottest part
    watts: float | None  # of the GPU, or of the chip that has one


def read_thermals(root: Path = Path("/"), run: Runner = run_command) -> Thermals:
    """Reads the sensors; takes up to a second where there is an NVIDIA GPU."""
    temperatures, powers = _linux(root) if sys.platform == "linux" else ([], [])
    for line in (run(_NVIDIA) or "").splitlines():
        for text, into in zip(line.split(","), (temperatures, powers), strict=False):
            if (value := _number(text)) is not None:
                into.append(value)
    return Thermals(max(temperatures, default=None), sum(powers) if powers else None)


def _linux(root: Path) -> tuple[list[float], list[float]]:
    """Degrees Celsius of all sensors, and watts of AMD's GPUs and APUs."""
    temperatures, powers = [], []
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(folder / "name") not in _CHIPS:
            continue
        temperatures += [t / 1000 for t in _numbers(folder, "temp*_input") if t > 0]
        powers += [p / 1e6 for p in _numbers(folder, "power*_average")]
    return temperatures, powers


def _numbers(folder: Path, pattern: str) -> list[float]:
    values = (_number(_text(path)) for path in sorted(folder.glob(pattern)))
    return [value for value in values if value is not None]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
