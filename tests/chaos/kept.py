"""Logs of a run that was slow or went wrong, kept beyond it: a rerun may not show it again."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Seconds of a stream's silence, or of planning, above which somebody should read why.
SLOW_SECONDS = 45.0
TIMELINE = "faults.txt"


def why_keep(found: Mapping[str, Any], slow: float = SLOW_SECONDS) -> list[str]:
    """Reasons to read the logs of a run, a line each; none for one that went well."""
    reasons = [f"WRONG: {what}" for what in found["wrong"]]
    waits = {
        "silence on a stream": found["gaps"],
        **{part.removesuffix("_s"): each for part, each in found["parts"].items()},
    }
    for what, seconds in waits.items():
        if seconds and max(seconds) > slow:
            reasons.append(f"{max(seconds):.1f} s of {what}, and {slow:g} s are the most")
    return reasons


class Timeline:
    """Faults and recoveries by time, by the clock that the logs have."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def note(self, what: str) -> None:
        self._lines.append(f"{time.strftime('%H:%M:%S')} {what}\n")

    def write(self, path: Path) -> None:
        path.write_text("".join(self._lines))


def keep(logs: Path, timeline: Timeline, reasons: list[str], into: Path | None = None) -> Path:
    """Copies what all programs of a cluster wrote to a fresh folder, which it returns.

    logs: the cluster's folder. into: where the fresh folder is made; None: with temporary files.
    """
    folder = Path(tempfile.mkdtemp(prefix="unicluster-chaos-", dir=into))
    for log in sorted([*logs.glob("*.err"), *logs.glob("*.out")]):
        shutil.copyfile(log, folder / log.name)
    timeline.write(folder / TIMELINE)
    (folder / "why.txt").write_text("".join(f"{reason}\n" for reason in reasons))
    return folder
