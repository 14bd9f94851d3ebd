"""The machines a plan may use, by kind, and what layers cost them."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from coordinator import cuts
from coordinator.cuts import Matrix
from coordinator.links import Network
from coordinator.placement import BANDWIDTH_SHARE, LAYER_S, Layout, Machine, Stage
from coordinator.problem import Piece, Problem
from coordinator.reach import Reach
from coordinator.stages import Span, hop, stages


@dataclass(frozen=True)
class _Row:
    """One figure over ranges of layers: `head[k]` over [0, k) on a head, `rest[j, k]` later."""

    head: Matrix
    rest: Matrix

    def values(self) -> list[float]:
        both = np.concatenate([self.head, self.rest.ravel()])
        return [float(value) for value in np.unique(both[np.isfinite(both)])]


class Pool:
    """Machines grouped into kinds: those that nothing in the search could tell apart."""

    def __init__(self, layout: Layout, machines: Sequence[Machine], network: Network) -> None:
        self.layout = layout
        self.network = network
        self.groups: list[list[Machine]] = []
        for machine in sorted(machines, key=lambda m: -m.bandwidth):
            group = next((g for g in self.groups if self._alike(machine, g[0], machines)), None)
            if group is None:
                self.groups.append([machine])
            else:
                group.append(machine)
        self.counts = [len(group) for group in self.groups]
        self.capacities = [layout.capacity(group[0].usable) for group in self.groups]
        self.held = self._row(layout.held_bytes, layout.head_bytes)
        self._read = self._row(layout.read_bytes, layout.head_read_bytes)
        self._layers = self._row([1] * layout.layers, 0)

    @property
    def machines(self) -> list[Machine]:
        return [machine for group in self.groups for machine in group]

    def problem(self, slowest: float = np.inf) -> Problem:
        """In seconds a token. No stage may take longer than `slowest`."""
        heads: list[Matrix] = []
        rests: list[Matrix] = []
        for group, capacity in zip(self.groups, self.capacities, strict=True):
            seconds = self._seconds(group[0])
            for costs, held, found in (
                (seconds.head, self.held.head, heads),
                (seconds.rest, self.held.rest, rests),
            ):
                fine = (held <= capacity) & (costs <= slowest)
                found.append(np.where(fine, costs, np.inf))
        return Problem(tuple(self.counts), np.stack(heads), np.stack(rests), self._hops())

    def least_slowest(self) -> tuple[float, bool]:
        """The least that the slowest stage can take, and whether that is proven."""
        problem = self.problem()
        costs = np.concatenate([problem.first.ravel(), problem.step.ravel()])
        values = [float(value) for value in np.unique(costs[np.isfinite(costs)])]
        exact = True

        def enough(limit: float) -> bool:
            nonlocal exact
            reach = Reach(problem.counts, problem.step <= limit, problem.first <= limit)
            possible = reach.possible()
            exact = exact and (possible or reach.exact)
            return possible

        return values[_first(values, enough)], exact

    def slowest_bound(self) -> float:
        """A time that the slowest stage can't be below: all machines as full as it allows."""
        problem, total = self.problem(), sum(self.layout.read_bytes)
        pairs = list(zip(self.groups, problem.step, problem.first, strict=True))

        def enough(limit: float) -> bool:
            most = 0.0
            for group, step, first in pairs:
                reads = [
                    self._read.rest[step <= limit].max(initial=0.0),
                    self._read.head[first <= limit].max(initial=0.0),
                ]
                most += len(group) * max(reads)
            return most >= total

        costs = np.concatenate([problem.first.ravel(), problem.step.ravel()])
        values = [float(value) for value in np.unique(costs[np.isfinite(costs)])]
        return values[_first(values, enough)]

    def fits(self) -> bool:
        return self._holds(self.counts, self.capacities)

    def missing_machine(self) -> int:
        """The least bytes of weights and KV that one more machine would have to hold."""
        values = self.held.values()
        more = [*self.counts, 1]
        at = _first(values, partial(self._holds_with, more))
        return int(values[at])

    def helped_by(self, machine: Machine, count: int) -> bool:
        """Whether the model fits with so many machines like this one besides."""
        capacity = self.layout.capacity(machine.usable)
        return self._holds([*self.counts, count], [*self.capacities, capacity])

    def shortfall(self) -> tuple[int, Machine | None]:
        """The fewest bytes that would do if one machine had them besides, and that machine."""
        values = self.held.values()
        best: tuple[int, Machine | None] = (self.layout.needed(int(values[-1])), None)
        for i, group in enumerate(self.groups):
            counts = [*self.counts, 1]
            counts[i] -= 1
            at = _first(values, partial(self._holds_with, counts))
            more = self.layout.needed(int(values[at])) - group[0].usable
            if best[1] is None or more < best[0]:
                best = (more, group[0])
        return best

    def stages(self, pieces: Sequence[Piece]) -> tuple[Stage, ...]:
        """A placement by kinds, given to machines of these kinds."""
        waiting = [iter(group) for group in self.groups]
        spans = [Span(next(waiting[p.kind]), p.first, p.end) for p in pieces]
        return stages(self.layout, self.network, spans)

    def _hop(self, one: Machine, other: Machine) -> float:
        return hop(self.layout, self.network, one, other)[0]

    def _hops(self) -> Matrix:
        kinds = len(self.groups)
        hops = np.zeros((kinds, kinds))
        for i, one in enumerate(self.groups):
            for j, other in enumerate(self.groups):
                if i != j:
                    hops[i, j] = self._hop(one[0], other[0])
                elif len(one) > 1:
                    hops[i, i] = self._hop(one[0], one[1])
        # A kind of one machine has no hop to itself; a number that is there already keeps the
        # search from telling it apart for that.
        for i in range(kinds):
            if len(self.groups[i]) == 1 and kinds > 1:
                hops[i, i] = np.delete(hops[i], i).max()
        return hops

    def _alike(self, one: Machine, other: Machine, machines: Sequence[Machine]) -> bool:
        key = (one.usable, one.bandwidth, one.pace) == (other.usable, other.bandwidth, other.pace)
        others = [m for m in machines if m is not one and m is not other]
        return key and all(self._hop(one, m) == self._hop(other, m) for m in others)

    def _seconds(self, machine: Machine) -> _Row:
        rate = BANDWIDTH_SHARE * machine.bandwidth
        return _Row(
            (self._read.head / rate + LAYER_S * self._layers.head) * machine.pace,
            (self._read.rest / rate + LAYER_S * self._layers.rest) * machine.pace,
        )

    def _row(self, values: Sequence[float], head: float) -> _Row:
        """Sums over ranges; inf for those that are empty or begin or end at a forbidden cut."""
        edges = np.concatenate(([0.0], np.cumsum(np.asarray(values, np.float64))))
        first = np.where(np.arange(len(edges)) == 0, np.inf, edges + head)
        return _Row(*cuts.without(first, cuts.range_sums(edges), self.layout.forbidden_cuts))

    def _holds_with(self, counts: Sequence[int], held: float) -> bool:
        """Whether everything fits where one more kind can hold so much."""
        return self._holds(counts, [*self.capacities, held])

    def _holds(self, counts: Sequence[int], capacities: Sequence[float]) -> bool:
        there = [i for i, count in enumerate(counts) if count]
        if not there:
            return False
        room = np.asarray([capacities[i] for i in there])
        rest = self.held.rest[None] <= room[:, None, None]
        head = self.held.head[None] <= room[:, None]
        return Reach([counts[i] for i in there], rest, head).possible()


def _first(values: Sequence[float], enough: Callable[[float], bool]) -> int:
    """The index of the first value that is enough; the last one must be."""
    return min(bisect.bisect_left(values, True, key=enough), len(values) - 1)
