"""The hardware catalogue: machines that people own or think of buying, each with its source."""

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from coordinator.planning.placement import Machine
from unicluster.errors import InputError
from unicluster.units import parse_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class Box:
    """A machine as it is sold: bytes, bytes and operations per second, US dollars.

    0 for a compute or a price that is not known. backend: of its GPU; what MLX has instead
    begins with mlx.
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
    backend: str
    mlx_backend: str
    mlx_bandwidth: float

    def machine(self, name: str = "") -> Machine:
        """One of these for the planner, called `name`."""
        return Machine(
            name=name or self.name,
            address="",
            usable=self.usable,
            bandwidth=self.mlx_bandwidth,
            chip=self.chip,
            backend=self.mlx_backend,
            compute=self.compute if self.mlx_backend == self.backend else 0.0,
            link=self.link,
            ggml_backend=self.backend,
            ggml_bandwidth=self.bandwidth,
            ggml_compute=self.compute,
        )


@cache
def boxes() -> dict[str, Box]:
    """The catalogue by name, in the order of its file."""
    text = resources.files("coordinator.planning").joinpath("hardware.yaml").read_text("utf-8")
    found = {}
    for row in yaml.safe_load(text):
        for option in row["memory"]:
            name = f"{row['family']}-{option}"
            memory = option * GIB
            found[name] = Box(
                name=name,
                chip=row["chip"],
                memory=memory,
                usable=_usable(row.get("usable", 2 / 3 if option <= 36 else 0.75), memory),
                bandwidth=row["bandwidth"] * 1e9,
                compute=row.get("tflops", 0) * 1e12,
                price=row.get("price", {}).get(option, 0),
                link=row["link"],
                source=row["source"],
                backend=row["backend"],
                mlx_backend=row.get("mlx_backend", row["backend"]),
                mlx_bandwidth=row.get("mlx_bandwidth", row["bandwidth"]) * 1e9,
            )
    return found


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
