"""Even cuts of a row of layers, for machines that are all alike. Pure numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def split_evenly(
    sizes: Sequence[int], head: int, count: int, forbidden: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """Cuts layers of these sizes into exactly `count` ranges with the smallest largest sum.

    `head` is added to the first range. Among equals, the ranges most alike in size win. There
    must be enough cuts that are not `forbidden`.
    """
    edges = np.concatenate(([0.0], np.cumsum(np.asarray(sizes, np.float64))))
    step = range_sums(edges)
    first, step = without(np.where(np.isfinite(step[0]), edges + head, np.inf), step, forbidden)
    largest = _chain(first, step, count, np.maximum)[0]
    fits = [np.where(costs <= largest, costs**2, np.inf) for costs in (first, step)]
    return _chain(fits[0], fits[1], count, np.add)[1]


def range_sums(edges: Matrix) -> Matrix:
    """`[j, k]` is the sum over [j, k) of what `edges` accumulates; inf for empty ranges."""
    return np.where(np.tri(len(edges), dtype=bool), np.inf, edges[None, :] - edges[:, None])


def without(first: Matrix, step: Matrix, forbidden: Sequence[int]) -> tuple[Matrix, Matrix]:
    """Costs of ranges, with inf for those that begin or end at a forbidden cut."""
    cut = np.isin(np.arange(len(first)), forbidden)
    return np.where(cut, np.inf, first), np.where(cut[:, None] | cut, np.inf, step)


def _chain(
    first: Matrix, step: Matrix, count: int, combine: np.ufunc
) -> tuple[float, list[tuple[int, int]]]:
    rows = [first]
    for _ in range(count - 1):
        rows.append(combine(rows[-1][:, None], step).min(axis=0))
    end = len(first) - 1
    ranges = []
    for row in reversed(rows[:-1]):
        start = int(combine(row, step[:, end]).argmin())
        ranges.append((start, end))
        end = start
    return float(rows[-1][-1]), [(0, end), *reversed(ranges)]
