"""The machines a plan may use, grouped by what matters to the search, and what layers cost them."""

import math
from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np

from coordinator import cuts
from coordinator.cuts import Kind, Matrix, Piece
from coordinator.placement import Layout, Machine, Stage

# On the head, by end; on a later stage, by start and end.
Costs = tuple[Matrix, Matrix]


class Pool:
    """Machines grouped by what matters to the search: memory, bandwidth and hop."""

    def __init__(self, layout: Layout, machines: Sequence[Machine]) -> None:
        self.layout = layout
        groups: dict[tuple[int, float, float], list[Machine]] = {}
        for machine in sorted(machines, key=lambda m: -m.bandwidth):
            key = (machine.usable, machine.bandwidth, machine.hop_s)
            groups.setdefault(key, []).append(machine)
        self.groups = list(groups.values())
        self.capacities = [layout.capacity(group[0].usable) for group in self.groups]
        # Sums over [0, k) with the head's bytes, and over [j, k).
        held, read = _edges(layout.held_bytes), _edges(layout.read_bytes)
        self.held = self._allowed(_with_head(held, layout.head_bytes), cuts.range_sums(held))
        self.read = self._allowed(_with_head(read, layout.head_bytes), cuts.range_sums(read))

    def _allowed(self, first: Matrix, step: Matrix) -> Costs:
        return cuts.without(first, step, self.layout.forbidden_cuts)

    @property
    def machines(self) -> list[Machine]:
        return [machine for group in self.groups for machine in group]

    def seconds(self, *, hops: bool, limit: float = math.inf) -> list[Costs]:
        """Of a token on a head and on a later stage, by group, with the hops or without.

        inf where it does not fit, and where a stage would take longer than `limit`.
        """
        costs = []
        for group, room in zip(self.groups, self.room(), strict=True):
            bandwidth, hop_s = group[0].bandwidth, group[0].hop_s if hops else 0.0
            first, step = (
                np.where(read / bandwidth <= limit * (1 + 1e-9), read / bandwidth + free, np.inf)
                for read, free in zip(self.read, room, strict=True)
            )
            first[:-1] += hop_s  # a head that holds every layer has no hop
            costs.append((first, step + hop_s))
        return costs

    def room(self) -> list[Costs]:
        """Zero where the layers fit a group's machine, else inf."""
        return [
            (np.where(self.held[0] <= c, 0.0, np.inf), np.where(self.held[1] <= c, 0.0, np.inf))
            for c in self.capacities
        ]

    def overflow(self) -> list[Costs]:
        """Bytes that are too many for a group's machine."""
        return [
            (np.maximum(self.held[0] - c, 0.0), np.maximum(self.held[1] - c, 0.0))
            for c in self.capacities
        ]

    def cut(self, combine: np.ufunc, costs: Sequence[Costs]) -> list[Piece] | None:
        """The best cut for these costs by group, one machine each in those beyond the groups."""
        counts = chain(map(len, self.groups), repeat(1))
        rooms = chain(self.capacities, repeat(math.inf))
        kinds = [Kind(n, room, *pair) for n, room, pair in zip(counts, rooms, costs, strict=False)]
        return cuts.best_cut(kinds, combine)

    def fits(self) -> bool:
        return self.cut(np.add, self.room()) is not None

    def missing_machine(self) -> int | None:
        """The least bytes of weights and KV that one more machine would have to hold."""
        pieces = self.cut(np.add, [*self.room(), self.held])
        extra = [piece for piece in pieces or () if piece.kind == len(self.groups)]
        if not extra:
            return None
        layers = slice(extra[0].first, extra[0].end)
        head_bytes = self.layout.head_bytes if layers.start == 0 else 0
        return sum(self.layout.held_bytes[layers]) + head_bytes

    def stages(self, pieces: Sequence[Piece]) -> tuple[Stage, ...]:
        layout = self.layout
        waiting = [iter(group) for group in self.groups]
        stages = []
        for piece in pieces:
            machine, layers = next(waiting[piece.kind]), slice(piece.first, piece.end)
            head_bytes = layout.head_bytes if piece.first == 0 else 0
            weights = sum(layout.layer_bytes[layers]) + head_bytes
            kv = sum(layout.kv_bytes_per_layer[layers])
            read = sum(layout.layer_active_bytes[layers]) + head_bytes + kv / layout.users
            stages.append(
                Stage(
                    machine=machine,
                    first=piece.first,
                    end=piece.end,
                    weight_bytes=weights,
                    kv_bytes=kv,
                    reserve_bytes=layout.reserve(weights + kv),
                    head=piece.first == 0,
                    seconds_per_token=read / machine.bandwidth,
                )
            )
        return tuple(stages)


def _edges(values: Sequence[float]) -> Matrix:
    return np.concatenate(([0.0], np.cumsum(np.asarray(values, np.float64))))


def _with_head(edges: Matrix, head_bytes: int) -> Matrix:
    """The head has at least one layer, so that ending at 0 is impossible."""
    return np.where(np.arange(len(edges)) == 0, np.inf, edges + head_bytes)
