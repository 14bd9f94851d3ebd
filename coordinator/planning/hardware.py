"""The hardware catalogue: machines by name, with their speeds, prices, and the source of each."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from coordinator.planning.engines import ENGINES
from coordinator.planning.machine import EngineSpeeds, Machine
from unicluster.errors import InputError
from unicluster.units import parse_bytes

GIB = 1 << 30
# An agent keeps back so much of its host's memory, or this part of it if that is more.
KEPT = 2 * GIB
KEPT_SHARE = 20


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
    listed = []
    for row in yaml.safe_load(text):
        for option in row["memory"]:
            box = _box(row, option)
            listed.append(box)
            if "carved" in row:
                listed.append(_carved(box, row["carved"]))
    return {box.name: box for box in listed}


def _box(row: Mapping[str, Any], option: int) -> Box:
    """One memory option of a row of the catalogue."""
    memory = option * GIB
    return Box(
        name=f"{row['family']}-{option}",
        chip=row["chip"],
        memory=memory,
        usable=_usable(row.get("usable", 2 / 3 if option <= 36 else 0.75), memory),
        bandwidth=row["bandwidth"] * 1e9,
        compute=row.get("tflops", 0) * 1e12,
        price=row.get("price", {}).get(option, 0),
        link=row["link"],
        source=row["source"],
        engines={engine: _speeds(row, engine, memory) for engine in ENGINES},
    )


def _carved(box: Box, carved: int) -> Box:
    """A box whose firmware carves out so many GiB for the GPU.

    By default the kernel lets the GPU map half of the rest besides. It has no price: it is not
    what one would buy.
    """
    host = box.memory - carved * GIB
    of_gpu = carved * GIB + host // 2 - box.memory // KEPT_SHARE
    of_host = host - max(KEPT, host // KEPT_SHARE)
    engines = {
        engine: replace(speeds, usable=of_host if speeds.backend == "cpu" else of_gpu)
        for engine, speeds in box.engines.items()
    }
    name = f"{box.name}-carved"
    return replace(box, name=name, usable=of_gpu, price=0, engines=engines)


def _speeds(row: Mapping[str, Any], engine: str, memory: int) -> EngineSpeeds:
    """Speeds of one engine: those of the GPU, but where the row has others, as `mlx_backend`."""
    usable = row.get(f"{engine}_usable")
    backend = row.get(f"{engine}_backend", row["backend"])
    return EngineSpeeds(
        bandwidth=row.get(f"{engine}_bandwidth", row["bandwidth"]) * 1e9,
        backend=backend,
        compute=row.get("tflops", 0) * 1e12 if backend == row["backend"] else 0.0,
        usable=None if usable is None else _usable(usable, memory),
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
