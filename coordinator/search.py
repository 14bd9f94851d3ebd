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
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import numpy as np
from numpy.typing import NDArray

from coordinator.reach import Ints, Reach

Matrix = NDArray[np.float64]

PRICE_ROUNDS = 60
# Up to so many machines, of any kind, the result is exact; beyond, the bound may be this share
# below it, and fewer paths are kept open.
EXACT = 8
TOLERANCE = 0.004
# Open paths, by the most machines there may be for it: what keeps a search to a few seconds.
LABELS = {EXACT: 200_000, 12: 20_000}
FEWEST_LABELS = 6_000
# Paths that are extended in one go: with 128 layers, 8 MB at a time.
CHUNK = 8192
EQUAL = 1e-9


@dataclass(frozen=True)
class Problem:
    """Kinds of machines and what layers cost on them, in seconds; inf where impossible.

    counts: machines of each kind. first[i, k]: layers [0, k) on a head of kind i.
    step[i, j, k]: layers [j, k) on a later stage. hops[i, l]: from a stage of kind i to one of
    kind l; a ring of one stage has none.
    """

    counts: tuple[int, ...]
    first: Matrix
    step: Matrix
    hops: Matrix

    @property
    def layers(self) -> int:
        return len(self.first[0]) - 1


@dataclass(frozen=True)
class Piece:
    """Layers [first, end) on a machine of that kind."""

    kind: int
    first: int
    end: int


@dataclass(frozen=True)
class Found:
    """The cheapest placement found, and a cost that none can be below."""

    pieces: tuple[Piece, ...]
    cost: float
    bound: float


def cheapest(problem: Problem) -> Found | None:
    """The placement of least cost, or None if none was found: none exists where Reach is exact."""
    reach = Reach(problem.counts, np.isfinite(problem.step), np.isfinite(problem.first))
    if not reach.possible():
        return None
    best = min(_in_order(problem), key=lambda found: found.cost, default=None)
    prices = _Prices(problem, np.zeros(len(problem.counts)))
    prices, best = _raise_prices(problem, prices, best)
    if best is not None and prices.bound >= best.cost * (1 - _tolerance(problem)):
        return _proven(problem, best, prices.bound)
    return _grow(problem, reach, prices, best)


def _tolerance(problem: Problem) -> float:
    return EQUAL if sum(problem.counts) <= EXACT else TOLERANCE


def _proven(problem: Problem, best: Found, bound: float) -> Found:
    """`best` with its bound; what is only rounding below the cost is the cost."""
    exact = bound >= best.cost * (1 - 2 * EQUAL)
    return Found(best.pieces, best.cost, best.cost if exact else bound)


class _Prices:
    """The cheapest path for given prices, and from each layer on the cheapest rest of one."""

    def __init__(self, problem: Problem, prices: Matrix) -> None:
        self.prices = prices
        n, kinds = problem.layers, len(problem.counts)
        # rest[h, k, i]: with a head of kind h, layers [0, k) done and the last stage of kind i.
        self.rest = np.empty((kinds, n + 1, kinds))
        self.rest[:, n, :] = problem.hops.T
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
        own = np.arange(kinds)
        starts = problem.first + prices[:, None]
        starts[:, :n] += self.rest[own, :n, own]
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


def _raise_prices(
    problem: Problem, prices: _Prices, best: Found | None
) -> tuple[_Prices, Found | None]:
    """Subgradient steps towards the prices of the highest bound."""
    counts = np.asarray(problem.counts)
    top, scale, stale = prices, 1.0, 0
    for _ in range(PRICE_ROUNDS):
        pieces = tuple(prices.path())
        excess = np.bincount([p.kind for p in pieces], minlength=len(counts)) - counts
        if (excess <= 0).all():
            cost = _cost(problem, pieces)
            if best is None or cost < best.cost:
                best = Found(pieces, cost, 0.0)
        target = best.cost if best is not None else 1.1 * abs(top.bound)
        gap = target - prices.bound
        moves = np.where((excess < 0) & (prices.prices == 0), 0, excess)
        near = target - top.bound <= _tolerance(problem) * target and best is not None
        if near or not moves.any():
            break
        step = scale * max(gap, EQUAL * abs(target)) / float(moves @ moves)
        prices = _Prices(problem, np.maximum(0.0, prices.prices + step * moves))
        if prices.bound > top.bound:
            top, stale = prices, 0
        elif (stale := stale + 1) % 4 == 0:
            scale /= 2
    return top, best


def _in_order(problem: Problem) -> Iterator[Found]:
    """The best placement on a subsequence of a few orders of all machines."""
    given = list(range(len(problem.counts)))
    roomiest = sorted(given, key=lambda i: -int(np.isfinite(problem.step[i]).sum()))
    for order in (given, roomiest):
        row = list(chain.from_iterable(repeat(i, problem.counts[i]) for i in order))
        for head in given:
            rest = row.copy()
            rest.remove(head)
            if (found := _along(problem, [head, *rest])) is not None:
                yield found


def _along(problem: Problem, order: Sequence[int]) -> Found | None:
    """The best placement on a subsequence of `order` whose first machine is the head."""
    head, n = order[0], problem.layers
    rows, origins = [problem.first[head]], []
    for at, kind in enumerate(order[1:], start=1):
        hops = problem.hops[list(order[:at]), kind]
        before = np.stack(rows) + hops[:, None]
        rows.append((before.min(axis=0)[:, None] + problem.step[kind]).min(axis=0))
        origins.append(before)
    closing = [0.0, *(float(problem.hops[kind, head]) for kind in order[1:])]
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
    return Found((Piece(head, 0, end), *reversed(pieces)), cost, 0.0)


def _cost(problem: Problem, pieces: Sequence[Piece]) -> float:
    head = pieces[0]
    cost = float(problem.first[head.kind, head.end])
    for before, piece in pairwise(pieces):
        cost += float(problem.hops[before.kind, piece.kind])
        cost += float(problem.step[piece.kind, piece.first, piece.end])
    return cost + (float(problem.hops[pieces[-1].kind, head.kind]) if len(pieces) > 1 else 0.0)


@dataclass(frozen=True)
class _Labels:
    """Open paths of one length, as columns. `parent` is the index in the length before."""

    parent: Ints
    head: Ints
    last: Ints
    end: Ints
    code: Ints
    used: Ints
    cost: Matrix
    bound: Matrix

    def take(self, rows: Ints) -> "_Labels":
        return _Labels(*(getattr(self, name)[rows] for name in _Labels.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.end)


def _grow(problem: Problem, reach: Reach, prices: _Prices, best: Found | None) -> Found | None:
    grower = _Grower(problem, reach, prices, best)
    return grower.run()


class _Grower:
    """Grows paths stage by stage, and keeps the best that is complete."""

    def __init__(self, problem: Problem, reach: Reach, prices: _Prices, best: Found | None) -> None:
        self._problem = problem
        self._prices = prices
        self._worth = 1 - _tolerance(problem)
        machines = sum(problem.counts)
        self._most = next((m for n, m in LABELS.items() if machines <= n), FEWEST_LABELS)
        self._counts = np.asarray(problem.counts, np.int64)
        self._strides = reach.strides
        self._codes, self._tails = reach.table()
        self._pruned = reach.exact
        self._best = best
        self._limit = best.cost if best is not None else np.inf
        self._dropped = np.inf
        self._history: list[_Labels] = []
        # Kinds that are alike in their hops need not be told apart in what a path has behind it.
        self._like_last = _classes(problem.hops)
        self._like_head = _classes(problem.hops.T)
        detours = (problem.hops[:, :, None] + problem.hops[None, :, :]).min(axis=1)
        alone = np.diag(self._counts == 1)  # no hop leads from a machine to itself
        self._metric = bool(((problem.hops <= detours) | alone).all())

    def run(self) -> Found | None:
        labels = self._heads()
        while len(labels):
            labels = labels.take(np.argsort(labels.bound, kind="stable"))
            if len(labels) > self._most:
                self._dropped = min(self._dropped, float(labels.bound[self._most]))
                labels = labels.take(np.arange(self._most))
            self._history.append(labels)
            labels = self._unique(self._extended(labels))
        if self._best is None:
            return None
        bound = max(min(self._best.cost * self._worth, self._dropped), self._prices.bound)
        return _proven(self._problem, self._best, bound)

    def _heads(self) -> _Labels:
        problem = self._problem
        kinds, ends = np.nonzero(np.isfinite(problem.first))
        whole = ends == problem.layers
        for kind in kinds[whole]:
            cost = float(problem.first[kind, problem.layers])
            self._complete((Piece(int(kind), 0, problem.layers),), cost)
        kinds, ends = kinds[~whole], ends[~whole]
        none = np.full(len(kinds), -1)
        used = (kinds[:, None] == np.arange(len(self._counts))).astype(np.int64)
        return self._labels(none, kinds, kinds, ends, used, problem.first[kinds, ends])

    def _extended(self, labels: _Labels) -> _Labels:
        grown = [
            part
            for start in range(0, len(labels), CHUNK)
            for kind in range(len(self._counts))
            if (part := self._onto(labels, np.arange(start, min(start + CHUNK, len(labels))), kind))
        ]
        if not grown:
            return labels.take(np.zeros(0, np.int64))
        fields = _Labels.__dataclass_fields__
        return _Labels(*(np.concatenate([getattr(part, f) for part in grown]) for f in fields))

    def _onto(self, labels: _Labels, rows: Ints, kind: int) -> _Labels | None:
        """Those of `rows` with one more stage, on a machine of that kind."""
        problem, n = self._problem, self._problem.layers
        rows = rows[labels.used[rows, kind] < self._counts[kind]]
        if not len(rows):
            return None
        reached = labels.cost[rows] + problem.hops[labels.last[rows], kind]
        costs = reached[:, None] + problem.step[kind][labels.end[rows]]
        whole = costs[:, n] + problem.hops[kind, labels.head[rows]]
        at = int(whole.argmin())
        if whole[at] < self._limit:
            tail = Piece(kind, int(labels.end[rows[at]]), n)
            self._complete((*self._pieces(labels, int(rows[at])), tail), float(whole[at]))
        used = labels.used[rows].copy()
        used[:, kind] += 1
        left = (self._counts - used) @ self._prices.prices
        bounds = costs + self._prices.rest[labels.head[rows], :, kind] - left[:, None]
        chosen, ends = np.nonzero(bounds[:, :n] < self._limit * self._worth)
        if not len(chosen):
            return None
        kinds = np.full(len(chosen), kind)
        return self._labels(
            rows[chosen], labels.head[rows[chosen]], kinds, ends, used[chosen], costs[chosen, ends]
        )

    def _labels(
        self, parent: Ints, head: Ints, last: Ints, end: Ints, used: Ints, cost: Matrix
    ) -> _Labels:
        """Labels of paths that can still be completed, and better than the best known."""
        left = self._counts - used
        bound = cost + self._prices.rest[head, end, last] - left @ self._prices.prices
        hopeful = bound < self._limit * self._worth
        if self._pruned:
            hopeful &= self._tails[np.searchsorted(self._codes, left @ self._strides)] <= end
        code = used @ self._strides
        labels = _Labels(parent, head, last, end, code, used, cost, bound)
        return labels.take(np.flatnonzero(hopeful))

    def _unique(self, labels: _Labels) -> _Labels:
        """Without paths that another with the same machines and ends of the ring makes needless.

        One that costs no more and is at least as far: what completes the other completes it,
        with less to do. Leaving a machine out must then save time, so a detour must take longer
        than the direct hop; where it does not, paths are compared only at the same layer.
        """
        groups = [self._like_head[labels.head], self._like_last[labels.last], labels.code]
        if not self._metric:
            groups.append(labels.end)
        order = np.lexsort((labels.cost, -labels.end, *groups))
        new = np.zeros(len(order), np.int64)
        for key in groups:
            new[1:] |= key[order][1:] != key[order][:-1]
        rank = np.empty(len(order), np.int64)
        rank[np.argsort(labels.cost, kind="stable")] = np.arange(len(order))
        # Each group's ranks lie below those of the groups before it: one running minimum does.
        ranks = rank[order] - np.cumsum(new) * len(order)
        least = np.minimum.accumulate(ranks)
        return labels.take(order[ranks == least])

    def _pieces(self, labels: _Labels, row: int) -> tuple[Piece, ...]:
        pieces: list[Piece] = []
        for level in reversed(self._history):
            end, parent = int(level.end[row]), int(level.parent[row])
            pieces.append(Piece(int(level.last[row]), 0, end))
            row = parent
        starts = [0, *(piece.end for piece in reversed(pieces))]
        return tuple(
            Piece(p.kind, first, p.end) for p, first in zip(reversed(pieces), starts, strict=False)
        )

    def _complete(self, pieces: tuple[Piece, ...], cost: float) -> None:
        if cost < self._limit:
            self._limit, self._best = cost, Found(pieces, cost, cost)


def _classes(rows: Matrix) -> Ints:
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
