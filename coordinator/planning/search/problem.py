"""Input and output of the search: kinds of machines with seconds, and a placement."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Up to so many machines, of any kind, the result is exact; beyond, the bound may be this share
# below it, and fewer paths are kept open.
EXACT = 8
TOLERANCE = 0.004
EQUAL = 1e-9
MACHINES = 1_000_000  # more than anybody has


@dataclass(frozen=True)
class Problem:
    """Kinds of machines and what layers cost on them, in seconds; inf where impossible.

    counts: machines of each kind. first[i, k]: layers [0, k) on a head of kind i.
    step[i, j, k]: layers [j, k) on a later stage. hops[i, l]: from a stage of kind i to one of
    kind l. back[i, l]: from the last stage to the head. A ring of one stage has neither.
    most: stages that a placement may have.
    """

    counts: tuple[int, ...]
    first: Matrix
    step: Matrix
    hops: Matrix
    back: Matrix
    most: int = MACHINES

    @property
    def layers(self) -> int:
        return len(self.first[0]) - 1

    @property
    def tolerance(self) -> float:
        """The share of the cost by which its bound may be below it."""
        return EQUAL if sum(self.counts) <= EXACT else TOLERANCE

    def cost(self, pieces: "Sequence[Piece]") -> float:
        """Seconds of a placement, its hops included."""
        head = pieces[0]
        cost = float(self.first[head.kind, head.end])
        for before, piece in pairwise(pieces):
            cost += float(self.hops[before.kind, piece.kind])
            cost += float(self.step[piece.kind, piece.first, piece.end])
        return cost + (float(self.back[pieces[-1].kind, head.kind]) if len(pieces) > 1 else 0.0)


@dataclass(frozen=True)
class Piece:
    """Layers [first, end) on a machine of that kind."""

    kind: int
    first: int
    end: int


@dataclass(frozen=True)
class Placement:
    """A placement with its cost, and a lower bound on the cost of every placement."""

    pieces: tuple[Piece, ...]
    cost: float
    bound: float

    def proven(self, bound: float) -> "Placement":
        """The placement with a proven bound: its cost, where they differ by rounding."""
        exact = bound >= self.cost * (1 - 2 * EQUAL)
        return Placement(self.pieces, self.cost, self.cost if exact else bound)
