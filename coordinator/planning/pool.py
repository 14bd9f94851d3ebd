"""The machines a plan may use, by kind, and what layers cost them."""

import bisect
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np

from coordinator.planning.costs import Costs, Row
from coordinator.planning.cuts import Matrix
from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Stage, reads
from coordinator.planning.search.problem import MACHINES, Piece, Problem
from coordinator.planning.search.reach import Reach
from coordinator.planning.stages import Span, hop, stages
from coordinator.planning.variants import RingVariants


class Pool:
    """Machines grouped into kinds: those that are equal to the search."""

    def __init__(self, ring: RingVariants, machines: Sequence[Machine], network: Network) -> None:
        self.ring = ring
        self.layout = ring.head
        self.network = network
        self.groups: list[list[Machine]] = []
        machines = [machine for machine in machines if ring.takes(machine)]
        for machine in sorted(machines, key=lambda m: -self._rate(m)):
            group = next((g for g in self.groups if self._alike(machine, g[0], machines)), None)
            if group is None:
                self.groups.append([machine])
            else:
                group.append(machine)
        self.counts = [len(group) for group in self.groups]
        self._costs = [Costs(variant) for variant in ring.variants]  # of the head's variant first

    @property
    def machines(self) -> list[Machine]:
        return [machine for group in self.groups for machine in group]

    def problem(
        self, slowest: float = np.inf, fullest: float = 1.0, most: int = MACHINES
    ) -> Problem:
        """Input of the search, in seconds a token. No stage may take longer than `slowest`.

        fullest: the part of its machine's usable memory that a stage may need. most: stages.
        """
        seconds, shares = self.seconds, self.shares

        def limited(costs: Matrix, filled: Matrix) -> Matrix:
            return np.where((costs <= slowest) & (filled <= fullest), costs, np.inf)

        first, step = limited(seconds.head, shares.head), limited(seconds.rest, shares.rest)
        hops, back = self._all_hops
        return Problem(tuple(self.counts), first, step, hops, back, most)

    @cached_property
    def seconds(self) -> Row:
        """Seconds a token of ranges of layers, for each kind, in the variant that is fastest."""
        rows = [[costs.seconds(group[0]) for costs in self._costs] for group in self.groups]
        return Row(
            np.stack([of_kind[0].head for of_kind in rows]),
            np.stack([np.minimum.reduce([row.rest for row in of_kind]) for of_kind in rows]),
        )

    @cached_property
    def shares(self) -> Row:
        """The part of the memory its engine reaches that each range needs, in that variant."""
        heads, rests = [], []
        for group in self.groups:
            parts = [costs.shares(group[0]) for costs in self._costs]
            taken = np.argmin([costs.seconds(group[0]).rest for costs in self._costs], axis=0)
            heads.append(parts[0].head)
            rests.append(np.choose(taken, [part.rest for part in parts]))
        return Row(np.stack(heads), np.stack(rests))

    @cached_property
    def _all_hops(self) -> tuple[Matrix, Matrix]:
        """Seconds of hops between kinds: onward, and back to the head."""
        return self._hops(self.layout.hidden_bytes), self._hops(self.layout.returned_bytes)

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
                    self._costs[0].read.rest[step <= limit].max(initial=0.0),
                    self._costs[0].read.head[first <= limit].max(initial=0.0),
                ]
                most += len(group) * max(reads)
            return most >= total

        costs = np.concatenate([problem.first.ravel(), problem.step.ravel()])
        values = [float(value) for value in np.unique(costs[np.isfinite(costs)])]
        return values[_first(values, enough)]

    def usable(self, machine: Machine) -> int:
        """Usable bytes there for the variant that gets the most of them."""
        return max(variant.usable_on(machine) for variant in self.ring.variants)

    def fits(self) -> bool:
        return self._holds(self.counts, [group[0] for group in self.groups])

    def missing_machine(self) -> int:
        """The least usable bytes that one more machine would have to offer."""
        values = self._needs()
        at = _first(values, partial(self._holds_besides, self.counts, Machine.uniform("", 0, 1.0)))
        return int(values[at])

    def helped_by(self, machine: Machine, count: int) -> bool:
        """Whether the model fits with so many machines like this one besides."""
        there = [group[0] for group in self.groups]
        return self._holds([*self.counts, count], [*there, machine])

    def shortfall(self) -> tuple[int, Machine | None]:
        """The fewest bytes that would do if one machine had them besides, and that machine."""
        values = self._needs()
        best: tuple[int, Machine | None] = (int(values[-1]), None)
        for i, group in enumerate(self.groups):
            counts = list(self.counts)
            counts[i] -= 1
            enough = partial(self._holds_besides, counts, group[0])
            at = _first(values, enough)
            more = int(values[at]) - self.usable(group[0])
            if enough(values[at]) and (best[1] is None or more < best[0]):
                best = (more, group[0])
        return best

    def stages(self, pieces: Sequence[Piece]) -> tuple[Stage, ...]:
        """Stages of a placement by kinds, assigned to machines of these kinds."""
        waiting = [iter(group) for group in self.groups]
        return stages(self.network, [self._span(next(waiting[p.kind]), p) for p in pieces])

    def _span(self, machine: Machine, piece: Piece) -> Span:
        """Layers in the variant that computes them fastest there."""
        first, end = piece.first, piece.end
        variant = self.ring.head
        if first > 0:
            variant = min(self._costs, key=lambda c: c.seconds(machine).rest[first, end]).layout
        return Span(machine, first, end, variant)

    def _rate(self, machine: Machine) -> float:
        return max(
            reads(variant, machine) for variant in self.ring.variants if machine.can(variant.engine)
        )

    def _hop(self, size: int, one: Machine, other: Machine) -> float:
        return hop(size, self.network, one, other)[0]

    def _hops(self, size: int) -> Matrix:
        kinds = len(self.groups)
        hops = np.zeros((kinds, kinds))
        for i, one in enumerate(self.groups):
            for j, other in enumerate(self.groups):
                if i != j:
                    hops[i, j] = self._hop(size, one[0], other[0])
                elif len(one) > 1:
                    hops[i, i] = self._hop(size, one[0], one[1])
        # A kind of one machine has no hop to itself; a number that is there already keeps the
        # search from telling it apart for that.
        for i in range(kinds):
            if len(self.groups[i]) == 1 and kinds > 1:
                hops[i, i] = np.delete(hops[i], i).max()
        return hops

    def _alike(self, one: Machine, other: Machine, machines: Sequence[Machine]) -> bool:
        others = [m for m in machines if m is not one and m is not other]
        return self._key(one) == self._key(other) and all(
            self._hop(size, one, m) == self._hop(size, other, m)
            for m in others
            for size in (self.layout.hidden_bytes, self.layout.returned_bytes)
        )

    def _key(self, machine: Machine) -> tuple[float, ...]:
        """All that the search sees of a machine, except its links."""
        key: list[float] = []
        for variant in self.ring.variants:
            if machine.can(variant.engine):
                speeds = machine.engines[variant.engine]
                key += [machine.reach(variant.engine), reads(variant, machine), speeds.slowdown]
                for device in speeds.devices[1:]:
                    key += [speeds.devices[0].usable, device.usable, device.bandwidth]
            key.append(-1.0)  # an end, so that devices of two variants are not mixed up
        return tuple(key)

    def _needs(self) -> list[float]:
        """All the usable bytes that there is a stage for."""
        return sorted({need for costs in self._costs for need in costs.needed.values()})

    def _holds_besides(self, counts: Sequence[int], like: Machine, usable: float) -> bool:
        """Whether everything fits where one more, like that one, offers so much."""
        there = [group[0] for group in self.groups]
        return self._holds([*counts, 1], [*there, like.with_usable(int(usable))])

    def _holds(self, counts: Sequence[int], kinds: Sequence[Machine]) -> bool:
        there = [i for i, count in enumerate(counts) if count]
        if not there:
            return False
        rest = [np.logical_or.reduce([c.fits(kinds[i])[1] for c in self._costs]) for i in there]
        head = [self._costs[0].fits(kinds[i])[0] for i in there]
        return Reach([counts[i] for i in there], np.stack(rest), np.stack(head)).possible()


def _first(values: Sequence[float], enough: Callable[[float], bool]) -> int:
    """The index of the first value that is enough; the last one must be."""
    return min(bisect.bisect_left(values, True, key=enough), len(values) - 1)
