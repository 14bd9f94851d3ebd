"""Findings of `unicluster doctor`."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """OK: as it should be. WARNING: works, but slowly or not always. ERROR: will not work."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line on one subject; `remedy`: a command or a step to take."""

    level: Level
    subject: str
    message: str
    remedy: str = ""
