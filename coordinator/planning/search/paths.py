"""Growing paths stage by stage until none that is open can be better than the best complete one."""

from dataclasses import dataclass

import numpy as np

from coordinator.planning.search.prices import Prices
from coordinator.planning.search.problem import EXACT, Matrix, Piece, Placement, Problem
from coordinator.planning.search.reach import Ints, Reach

# Open paths, by the most machines there may be for it: what keeps a search to a few seconds.
LABELS = {EXACT: 200_000, 12: 20_000}
FEWEST_LABELS = 6_000
# Paths that are extended in one go: with 128 layers, 8 MB at a time.
CHUNK = 8192


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


class Grower:
    """Grows paths stage by stage, and keeps the best that is complete."""

    def __init__(
        self,
        problem: Problem,
        reach: Reach,
        prices: Prices,
        best: Placement | None,
        enough: float | None = None,
    ) -> None:
        """`best`: the best placement known. `enough`: any that costs less will do."""
        self._problem = problem
        self._prices = prices
        self._worth = 1 - problem.tolerance
        machines = sum(problem.counts)
        self._most = next((m for n, m in LABELS.items() if machines <= n), FEWEST_LABELS)
        self._counts = np.asarray(problem.counts, np.int64)
        self._strides = reach.strides
        self._codes, self._tails = reach.table()
        self._pruned = reach.exact
        self._best = best
        self._limit = best.cost if best is not None else np.inf
        self._any = enough is not None
        if enough is not None:
            self._limit = min(self._limit, enough)
        self._dropped = np.inf
        self._history: list[_Labels] = []
        # Kinds that are alike in their hops are equal in the history of a path.
        self._like_last = _classes(problem.hops)
        self._like_head = _classes(problem.back.T)
        detours = (problem.hops[:, :, None] + problem.hops[None, :, :]).min(axis=1)
        alone = np.diag(self._counts == 1)  # no hop leads from a machine to itself
        self._metric = bool(((problem.hops <= detours) | alone).all())

    def run(self) -> Placement | None:
        labels = self._heads()
        while len(labels) and len(self._history) + 1 < self._problem.most:
            if self._any and self._best is not None:
                break
            labels = labels.take(np.argsort(labels.bound, kind="stable"))
            if len(labels) > self._most:
                self._dropped = min(self._dropped, float(labels.bound[self._most]))
                labels = labels.take(np.arange(self._most))
            self._history.append(labels)
            labels = self._unique(self._extended(labels))
        if self._best is None:
            return None
        bound = max(min(self._best.cost * self._worth, self._dropped), self._prices.bound)
        return self._best.proven(bound)

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
        """Labels of `rows` extended by one more stage, on a machine of that kind."""
        problem, n = self._problem, self._problem.layers
        rows = rows[labels.used[rows, kind] < self._counts[kind]]
        if not len(rows):
            return None
        reached = labels.cost[rows] + problem.hops[labels.last[rows], kind]
        costs = reached[:, None] + problem.step[kind][labels.end[rows]]
        whole = costs[:, n] + problem.back[kind, labels.head[rows]]
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
        promising = bound < self._limit * self._worth
        if self._pruned:
            promising &= self._tails[np.searchsorted(self._codes, left @ self._strides)] <= end
        code = used @ self._strides
        labels = _Labels(parent, head, last, end, code, used, cost, bound)
        return labels.take(np.flatnonzero(promising))

    def _unique(self, labels: _Labels) -> _Labels:
        """Drops paths that another with the same machines and ends of the ring dominates.

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
            self._limit, self._best = cost, Placement(pieces, cost, cost)


def _classes(rows: Matrix) -> Ints:
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
