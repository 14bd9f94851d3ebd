"""Seconds and bytes of ranges of a model's layers on a machine, in one of its variants."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.planning import cuts, devices
from coordinator.planning.cuts import Matrix
from coordinator.planning.machine import Machine
from coordinator.planning.placement import LAYER_S, RESERVE_SHARE, Layout, reads
from coordinator.planning.search.reach import Bools


@dataclass(frozen=True)
class Row:
    """One figure over ranges of layers: `head[k]` over [0, k) on a head, `rest[j, k]` later.

    Of several kinds of machines they have one more axis in front, for the kind.
    """

    head: Matrix
    rest: Matrix

    def values(self) -> list[float]:
        both = np.concatenate([self.head, self.rest.ravel()])
        return [float(value) for value in np.unique(both[np.isfinite(both)])]


class Costs:
    """Usable bytes that each range of layers needs, and bytes it reads for a token.

    inf for those that are empty or begin or end at a forbidden cut.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        resident = self._row(layout.resident_bytes, layout.head_bytes)
        self._resident = resident
        self.needed = Row(self._with_reserve(resident.head), self._with_reserve(resident.rest))
        self.read = self._row(layout.read_bytes, layout.head_read_bytes)
        self._layers = self._row([1] * layout.layers, 0)

    def fits(self, machine: Machine) -> tuple[Bools, Bools]:
        """Whether each range fits on the machine: [0, k) as head, and [j, k) as a later stage."""
        usable = self.layout.usable_on(machine)
        return self.needed.head <= usable, self.needed.rest <= usable

    def seconds(self, machine: Machine) -> Row:
        """Seconds a token; inf where it does not fit, or the engine is not there."""
        head, rest = self.fits(machine)
        if not machine.can(self.layout.engine):
            return Row(np.full(head.shape, np.inf), np.full(rest.shape, np.inf))
        of_head = self._seconds(machine, self.read.head, self._layers.head, self._resident.head)
        of_rest = self._seconds(machine, self.read.rest, self._layers.rest, self._resident.rest)
        return Row(np.where(head, of_head, np.inf), np.where(rest, of_rest, np.inf))

    def shares(self, machine: Machine) -> Row:
        """The part of the machine's memory for the engine that each range needs."""
        usable = max(self.layout.usable_on(machine), 1)
        return Row(self.needed.head / usable, self.needed.rest / usable)

    def _seconds(self, machine: Machine, read: Matrix, layers: Matrix, resident: Matrix) -> Matrix:
        speeds = machine.engines[self.layout.engine]
        slower = devices.slower(speeds, self.layout.capacity, resident)
        return read / reads(self.layout, machine) * slower + LAYER_S * layers * speeds.slowdown

    def _with_reserve(self, resident: Matrix) -> Matrix:
        """Bytes including the reserve, as Layout.needed computes them."""
        share = np.minimum(self.layout.full_reserve, np.floor(resident / RESERVE_SHARE))
        return resident + np.maximum(share, self.layout.workspace)

    def _row(self, values: Sequence[float], head: float) -> Row:
        edges = np.concatenate(([0.0], np.cumsum(np.asarray(values, np.float64))))
        first = np.where(np.arange(len(edges)) == 0, np.inf, edges + head)
        return Row(*cuts.without(first, cuts.range_sums(edges), self.layout.forbidden_cuts))
