"""Prices on kinds of machines, and the bound that they prove.

A price on each kind (a Lagrange multiplier) makes paths keep to how many machines there are of it.
What the cheapest path costs at these prices, less the prices of all machines there are, is a lower
bound on every placement.
"""

from collections.abc import Iterator

import numpy as np

from coordinator.planning.search.problem import EQUAL, Matrix, Piece, Placement, Problem

PRICE_ROUNDS = 60
# Where any placement that is cheap enough will do, growing paths soon takes less time.
ENOUGH_ROUNDS = 16


class Prices:
    """The cheapest path for given prices, and from each layer on the cheapest rest of one."""

    def __init__(self, problem: Problem, prices: Matrix) -> None:
        self.prices = prices
        n, kinds = problem.layers, len(problem.counts)
        # rest[h, k, i]: with a head of kind h, layers [0, k) done and the last stage of kind i.
        self.rest = np.empty((kinds, n + 1, kinds))
        self.rest[:, n, :] = problem.back.T
        self._ends = np.zeros((kinds, kinds, n + 1), np.int64)
        self._next = np.zeros((kinds, n + 1, kinds), np.int64)
        onward = problem.hops + prices
        for j in range(n - 1, 0, -1):
            stages = problem.step[:, j, j + 1 :] + self.rest[:, j + 1 :].transpose(0, 2, 1)
            end = stages.argmin(axis=2)
            self._ends[:, :, j] = end + j + 1
            after = np.take_along_axis(stages, end[:, :, None], 2)[:, :, 0]
            through = onward + after[:, None, :]
            kind = through.argmin(axis=2)
            self._next[:, j] = kind
            self.rest[:, j] = np.take_along_axis(through, kind[:, :, None], 2)[:, :, 0]
        each = np.arange(kinds)
        starts = problem.first + prices[:, None]
        starts[:, :n] += self.rest[each, :n, each]
        head, end = divmod(int(starts[:, 1:].argmin()), n)
        self._head, self._end = head, end + 1
        self.bound = float(starts[:, 1:].min() - prices @ np.asarray(problem.counts))

    def path(self) -> Iterator[Piece]:
        """The cheapest path; it may use more machines of a kind than there are."""
        layers = self._ends.shape[2] - 1
        yield Piece(self._head, 0, self._end)
        kind, first = self._head, self._end
        while first < layers:
            kind = int(self._next[self._head, first, kind])
            end = int(self._ends[self._head, kind, first])
            yield Piece(kind, first, end)
            first = end


def raise_prices(
    problem: Problem, prices: Prices, best: Placement | None, enough: float = -np.inf
) -> tuple[Prices, Placement | None]:
    """Subgradient steps towards the prices of the highest bound.

    They end when a placement costs no more than `enough`, or the bound proves that none does.
    """
    counts = np.asarray(problem.counts)
    top, scale, stale = prices, 1.0, 0
    for _ in range(ENOUGH_ROUNDS if np.isfinite(enough) else PRICE_ROUNDS):
        if top.bound > enough > -np.inf:
            break
        pieces = tuple(prices.path())
        excess = np.bincount([p.kind for p in pieces], minlength=len(counts)) - counts
        if (excess <= 0).all() and len(pieces) <= problem.most:
            cost = problem.cost(pieces)
            if best is None or cost < best.cost:
                best = Placement(pieces, cost, 0.0)
        hoped = 1.001 * enough if np.isfinite(enough) else 1.1 * abs(top.bound)
        target = best.cost if best is not None else hoped
        gap = target - prices.bound
        moves = np.where((excess < 0) & (prices.prices == 0), 0, excess)
        near = target - top.bound <= problem.tolerance * target and best is not None
        cheap = best is not None and best.cost <= enough
        if near or cheap or not moves.any():
            break
        step = scale * max(gap, EQUAL * abs(target)) / float(moves @ moves)
        prices = Prices(problem, np.maximum(0.0, prices.prices + step * moves))
        if prices.bound > top.bound:
            top, stale = prices, 0
        elif (stale := stale + 1) % 4 == 0:
            scale /= 2
    return top, best
