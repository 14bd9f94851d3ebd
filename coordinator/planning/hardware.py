"""The hardware catalogue: machines by name, with their speeds, prices, and the source of each."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from coordinator.planning.engines import ENGINES
from coordinator.planning.machine import EngineSpeeds, Machine
from unicluster.errors import InputError
from unicluster.units import parse_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class Box:
    """A machine as it is sold: bytes, bytes and operations per second, US dollars.

    0 for a compute or a price that is not known. bandwidth and compute are those of its GPU;
    `engines` has what each engine reaches of them.
    """

    name: str
    chip: str
    memory: int
    usable: int
    bandwidth: float
    compute: float
    price: int
    link: str
    source: str
    engines: Mapping[str, EngineSpeeds]

    def machine(self, name: str = "") -> Machine:
        """One of these for the planner, called `name`."""
        return Machine(
            name=name or self.name,
            address="",
            usable=self.usable,
            engines=self.engines,
            chip=self.chip,
            link=self.link,
        )


@cache
def boxes() -> dict[str, Box]:
    """The catalogue by name, in the order of its file."""
    text = resources.files("coordinator.planning").joinpath("hardware.yaml").read_text("utf-8")
    catalogue = {}
    for row in yaml.safe_load(text):
        for option in row["memory"]:
            name = f"{row['family']}-{option}"
            memory = option * GIB
            catalogue[name] = Box(
                name=name,
                chip=row["chip"],
                memory=memory,
                usable=_usable(row.get("usable", 2 / 3 if option <= 36 else 0.75), memory),
                bandwidth=row["bandwidth"] * 1e9,
                compute=row.get("tflops", 0) * 1e12,
                price=row.get("price", {}).get(option, 0),
                link=row["link"],
                source=row["source"],
                engines={engine: _speeds(row, engine) for engine in ENGINES},
            )
    return catalogue


def _speeds(row: Mapping[str, Any], engine: str) -> EngineSpeeds:
    """Speeds of one engine: those of the GPU, but where the row has others, as `mlx_backend`."""
    backend = row.get(f"{engine}_backend", row["backend"])
    return EngineSpeeds(
        bandwidth=row.get(f"{engine}_bandwidth", row["bandwidth"]) * 1e9,
        backend=backend,
        compute=row.get("tflops", 0) * 1e12 if backend == row["backend"] else 0.0,
    )


def find(name: str) -> Box:
    """The machine of that name. Raises InputError with the closest names."""
    key = name.strip().lower()
    if box := boxes().get(key):
        return box
    only = [box for box in boxes().values() if box.name.rpartition("-")[0] == key]
    if len(only) == 1:
        return only[0]
    close = [box.name for box in only] or difflib.get_close_matches(key, boxes(), 3, 0.4)
    known = f"did you mean {' or '.join(close)}? " if close else ""
    raise InputError(f"no hardware {name.strip()!r}: {known}`unicluster hardware` lists all")


def known_compute(chip: str) -> float:
    """Operations per second of a chip that an agent names; the least of its variants, or 0."""
    names = [box for box in boxes().values() if chip and box.chip.split(" (")[0] == chip]
    return min((box.compute for box in names), default=0.0)


def _usable(stated: str | float, memory: int) -> int:
    return parse_bytes(stated) if isinstance(stated, str) else int(stated * memory)
