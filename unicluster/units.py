"""Bytes and rates as people write and read them. GB is decimal, GiB binary."""

import re
from decimal import Decimal

from unicluster.errors import InputError

_FACTORS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("kmgtp", 1)},
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgtp", 1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgtp", 1)},
    "b": 1,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")


def counted(number: int, noun: str) -> str:
    """ "1 stage", "2 stages"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def parse_bytes(text: str) -> int:
    """96000000000 from "96GB", "96 gb" or "96G"; also MiB and so on, and plain bytes.

    Raises InputError for anything else.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _FACTORS:
        raise InputError(f"invalid size {text!r}: write it like 96GB or 512MiB")
    return int(Decimal(match[1]) * _FACTORS[match[2]])


def format_bytes(count: float) -> str:
    """ "96.0 GB": decimal, one digit after the point from kB on."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.95 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """ "256 GB/s", or "1.2 GB/s" where the digit after the point matters."""
    number, unit = format_bytes(bytes_per_second).split()
    return f"{float(number):.0f} {unit}/s" if float(number) >= 100 else f"{number} {unit}/s"


def format_ms(seconds: float) -> str:
    """Milliseconds, three digits: 0.042, 1.24, 125."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
