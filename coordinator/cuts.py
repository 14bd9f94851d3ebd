"""The search for the best cut of a row of layers over machines, for any cost. Pure numpy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from math import prod

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# 2**10 subsets of ten machines, twice that when one imagined machine joins them.
# More are searched in a few orders only.
MAX_STATES = 2048


@dataclass(frozen=True)
class Kind:
    """Machines that cost the same, and what layers cost on one of them; inf: impossible.

    `first[k]`: layers [0, k) on the head. `step[j, k]`: layers [j, k) on a later stage.
    `room` in bytes matters only to the order in which many machines are tried.
    """

    count: int
    room: float
    first: Matrix
    step: Matrix


@dataclass(frozen=True)
class Piece:
    """Layers [first, end) on a machine of that kind."""

    kind: int
    first: int
    end: int


def best_cut(kinds: Sequence[Kind], combine: np.ufunc) -> list[Piece] | None:
    """The cheapest row of pieces that covers every layer, or None if there is none.

    A cut costs `combine` (np.add or np.maximum) over its pieces; among equals the fewest
    pieces win. Exact over all subsets and orders while the subsets, counted by kind, are at
    most MAX_STATES: that is any ten machines, and more when some are alike. Beyond that, exact
    over the subsets and cuts of two orders, as given and the roomiest first, each with every
    kind tried as the head.
    """
    if not kinds:
        return None
    if prod(kind.count + 1 for kind in kinds) <= MAX_STATES:
        return _over_subsets(kinds, combine)
    found = [cut for order in _orders(kinds) if (cut := _over_order(kinds, order, combine))]
    return min(found, key=lambda cut: cut[0])[1] if found else None


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
    """The same costs, with inf for what begins or ends at a forbidden cut."""
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


def _over_subsets(kinds: Sequence[Kind], combine: np.ufunc) -> list[Piece] | None:
    """Row s of `best` holds, for the machines of subset s, the cost of layers [0, k)."""
    used = np.indices([kind.count + 1 for kind in kinds]).reshape(len(kinds), -1)
    strides = [prod(kind.count + 1 for kind in kinds[i + 1 :]) for i in range(len(kinds))]
    machines = used.sum(axis=0)
    best = np.full((used.shape[1], len(kinds[0].first)), np.inf)
    for kind, stride in zip(kinds, strides, strict=True):
        best[stride] = kind.first
    for size in range(2, int(machines.max()) + 1):
        for i, kind in enumerate(kinds):
            subsets = np.flatnonzero((machines == size) & (used[i] > 0))
            before = best[subsets - strides[i]]
            costs = combine(before[:, :, None], kind.step).min(axis=1)
            best[subsets] = np.minimum(best[subsets], costs)

    end = best.shape[1] - 1
    by_size = np.argsort(machines, kind="stable")
    subset = int(by_size[best[by_size, end].argmin()])
    if not np.isfinite(best[subset, end]):
        return None
    pieces: list[Piece] = []
    while machines[subset] > 1:
        costs = [
            combine(best[subset - strides[i]], kind.step[:, end])
            if used[i, subset]
            else np.full(len(best[subset]), np.inf)
            for i, kind in enumerate(kinds)
        ]
        i, start = divmod(int(np.argmin(costs)), best.shape[1])
        pieces.append(Piece(i, start, end))
        subset, end = subset - strides[i], start
    return [Piece(strides.index(subset), 0, end), *reversed(pieces)]


def _orders(kinds: Sequence[Kind]) -> Iterator[list[int]]:
    given = list(range(len(kinds)))
    roomiest = sorted(given, key=lambda i: -kinds[i].room)
    for order in (given, roomiest):
        row = list(chain.from_iterable(repeat(i, kinds[i].count) for i in order))
        for head in order:
            rest = row.copy()
            rest.remove(head)
            yield [head, *rest]


def _over_order(
    kinds: Sequence[Kind], order: Sequence[int], combine: np.ufunc
) -> tuple[float, list[Piece]] | None:
    """The best cut over a subsequence of `order`, whose first machine is the head."""
    rows = [kinds[order[0]].first]
    for i in order[1:]:
        costs = combine(rows[-1][:, None], kinds[i].step).min(axis=0)
        rows.append(np.minimum(rows[-1], costs))
    cost = float(rows[-1][-1])
    if not np.isfinite(cost):
        return None
    end = len(rows[0]) - 1
    pieces: list[Piece] = []
    for i, before, after in reversed(list(zip(order[1:], rows[:-1], rows[1:], strict=True))):
        if before[end] == after[end]:
            continue
        start = int(combine(before, kinds[i].step[:, end]).argmin())
        pieces.append(Piece(i, start, end))
        end = start
    return cost, [Piece(order[0], 0, end), *reversed(pieces)]
