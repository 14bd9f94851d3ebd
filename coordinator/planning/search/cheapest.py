"""The search for the cheapest row of machines over a row of layers, with a proof of how cheap.

A placement is a path: the head takes layers [0, k), the next machine goes on from there, and the
last hop closes the ring. Machines that are alike are counted by kind. Without counts the cheapest
path is a short dynamic program; a price on each kind (a Lagrange multiplier) makes paths keep to
the counts, and what such a path costs, less the prices of all machines there are, is a lower
bound on every placement. Paths are then grown stage by stage, and those whose bound reaches the
best placement known are dropped. What is left is exact; with more than EXACT machines a small
gap is let stand, and where too many paths are open at once the least promising are dropped: the
bound says so.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat

import numpy as np

from coordinator.planning.search.paths import Grower
from coordinator.planning.search.prices import Prices, raise_prices
from coordinator.planning.search.problem import EQUAL, Matrix, Piece, Placement, Problem
from coordinator.planning.search.reach import Reach


def cheapest(problem: Problem) -> Placement | None:
    """The placement of least cost, or None if none was found: none exists where Reach is exact."""
    reach = _reach(problem)
    if not reach.possible():
        return None
    best = min(_in_order(problem), key=lambda placement: placement.cost, default=None)
    prices = Prices(problem, np.zeros(len(problem.counts)))
    prices, best = raise_prices(problem, prices, best)
    if best is not None and prices.bound >= best.cost * (1 - problem.tolerance):
        return best.proven(prices.bound)
    return Grower(problem, reach, prices, best).run()


class Finder:
    """Finds placements that are cheap enough in problems that differ little from each other.

    Faster than `cheapest`, as any such placement will do, and each search begins with the prices
    that the one before came to.
    """

    def __init__(self) -> None:
        self._prices: Matrix | None = None

    def within(self, problem: Problem, limit: float) -> Placement | None:
        """A placement that costs at most `limit`; None if none was found, as in `cheapest`.

        Its bound proves nothing.
        """
        limit *= 1 + 4 * EQUAL  # what costs as much is not lost to rounding
        reach = _reach(problem)
        if not reach.possible():
            return None
        for placement in _in_order(problem):
            if placement.cost <= limit:
                return placement
        start = np.zeros(len(problem.counts)) if self._prices is None else self._prices
        prices, best = raise_prices(problem, Prices(problem, start), None, limit)
        self._prices = prices.prices
        if best is not None and best.cost <= limit:
            return best
        if prices.bound > limit:
            return None
        return Grower(problem, reach, prices, None, limit).run()


def _reach(problem: Problem) -> Reach:
    return Reach(problem.counts, np.isfinite(problem.step), np.isfinite(problem.first))


def _in_order(problem: Problem) -> Iterator[Placement]:
    """The best placement on a subsequence of a few orders of all machines."""
    kinds = list(range(len(problem.counts)))
    roomiest = sorted(kinds, key=lambda i: -int(np.isfinite(problem.step[i]).sum()))
    for order in (kinds, roomiest):
        row = list(chain.from_iterable(repeat(i, problem.counts[i]) for i in order))
        for head in kinds:
            rest = row.copy()
            rest.remove(head)
            placement = _along(problem, [head, *rest])
            if placement is not None and len(placement.pieces) <= problem.most:
                yield placement


def _along(problem: Problem, order: Sequence[int]) -> Placement | None:
    """The best placement on a subsequence of `order` whose first machine is the head."""
    head, n = order[0], problem.layers
    rows, origins = [problem.first[head]], []
    for at, kind in enumerate(order[1:], start=1):
        hops = problem.hops[list(order[:at]), kind]
        before = np.stack(rows) + hops[:, None]
        rows.append((before.min(axis=0)[:, None] + problem.step[kind]).min(axis=0))
        origins.append(before)
    closing = [0.0, *(float(problem.back[kind, head]) for kind in order[1:])]
    ends = [row[n] + hop for row, hop in zip(rows, closing, strict=True)]
    at = int(np.argmin(ends))
    cost, end = float(ends[at]), n
    if not np.isfinite(cost):
        return None
    pieces: list[Piece] = []
    while at > 0:
        before = origins[at - 1]
        first = int((before.min(axis=0) + problem.step[order[at]][:, end]).argmin())
        pieces.append(Piece(order[at], first, end))
        at, end = int(before[:, first].argmin()), first
    return Placement((Piece(head, 0, end), *reversed(pieces)), cost, 0.0)
