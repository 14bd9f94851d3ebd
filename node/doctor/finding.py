"""What `unicluster doctor` finds."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """GOOD: as it should be. ODD: works, but slowly or not always. BAD: will not work."""

    GOOD = "good"
    ODD = "odd"
    BAD = "bad"


@dataclass(frozen=True)
class Finding:
    """One line on one subject; `mend` says what to do."""

    level: Level
    subject: str
    what: str
    mend: str = ""
