"""Among plans of equal speed, the one whose machines are loaded most evenly.

Machines that are alike give the same seconds a token however the layers are cut between them, but
prompts take as long as the slowest stage, and a machine without free memory is the first to fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from coordinator.planning.costs import Row
from coordinator.planning.cuts import Matrix
from coordinator.planning.pool import Pool
from coordinator.planning.search.cheapest import Finder, cheapest
from coordinator.planning.search.problem import EXACT, Piece, Placement, Problem

# Predictions are no better than this: plans that differ by less are of equal speed.
EQUAL_SPEED = 0.005
# The part of each machine's usable memory that a plan leaves free where that costs no speed.
HEADROOM = 0.03
WEIGHT_ROUNDS = 40

Name = Literal["slowest", "fullest"]


@dataclass(frozen=True)
class Limits:
    """Limits of a placement: seconds a token and stages; of each stage, seconds and a part of its
    machine's usable memory.
    """

    seconds: float
    most: int
    slowest: float = np.inf
    fullest: float = 1.0

    def with_limit(self, name: Name, value: float) -> "Limits":
        """These limits with another value of one of them."""
        if name == "slowest":
            return replace(self, slowest=value)
        return replace(self, fullest=value)


def balanced(pool: Pool, limits: Limits, known: Placement) -> Placement:
    """The most even of the placements within `limits`, of which `known` is one.

    Those that leave HEADROOM everywhere, if there are any; of these those with the fastest slowest
    stage, unless `limits` say how slow it may be; then those whose fullest machine has the largest
    free share; and of these the ring of least seconds, cut for shares that are most alike. With
    more than EXACT machines only the cuts of the known ring are changed.
    """
    finder = Finder()
    roomy = replace(limits, fullest=1 - HEADROOM)
    if (with_room := _any(finder, pool, roomy, known)) is not None:
        limits, known = roomy, with_room
    if not np.isfinite(limits.slowest):
        slowest, known = _least(pool, limits, known, finder, "slowest")
        limits = replace(limits, slowest=slowest)
    fullest, known = _least(pool, limits, known, finder, "fullest")
    limits = replace(limits, fullest=fullest)
    if sum(pool.counts) <= EXACT:
        best = cheapest(_problem(pool, limits))
        known = best if best is not None and best.cost < known.cost else known
    return _evened(pool, known, limits)


def _problem(pool: Pool, limits: Limits) -> Problem:
    return pool.problem(limits.slowest, limits.fullest, limits.most)


def _any(finder: Finder, pool: Pool, limits: Limits, known: Placement) -> Placement | None:
    """A placement within the limits, on other machines too if they can be searched."""
    problem = _problem(pool, limits)
    if sum(pool.counts) <= EXACT:
        return finder.within(problem, limits.seconds)
    pieces = _cut([piece.kind for piece in known.pieces], problem.first, problem.step)
    cost = problem.cost(pieces) if pieces[0].end else np.inf
    return Placement(pieces, cost, 0.0) if cost <= limits.seconds else None


def _least(
    pool: Pool, limits: Limits, known: Placement, finder: Finder, field: Name
) -> tuple[float, Placement]:
    """The least that the limit of that name can be, and a placement within it."""
    figures = pool.seconds if field == "slowest" else pool.shares
    high = _largest(known, figures)
    every = np.unique(np.concatenate([figures.head.ravel(), figures.rest.ravel()]))
    values = every[(every < high) & (every > 0)]
    while len(values):
        at = len(values) // 2
        tighter = _any(finder, pool, limits.with_limit(field, float(values[at])), known)
        if tighter is None:
            values = values[at + 1 :]
        else:
            known, high = tighter, _largest(tighter, figures)
            values = values[values < high]
    return high, known


def _largest(placement: Placement, figures: Row) -> float:
    """The largest figure of a placement's stages."""
    head, *rest = placement.pieces
    later = [float(figures.rest[p.kind, p.first, p.end]) for p in rest]
    return max([float(figures.head[head.kind, head.end]), *later])


def _evened(pool: Pool, best: Placement, limits: Limits) -> Placement:
    """The placement's ring with the cuts whose shares of memory are most alike.

    A weight on seconds is raised until the ring is as fast as it must be.
    """
    problem, kinds = _problem(pool, limits), [piece.kind for piece in best.pieces]
    seconds = problem.first, problem.step
    shares = pool.shares.head**2, pool.shares.rest**2
    low, high, weight, evened = 0.0, np.inf, 0.0, best
    possible = [np.isfinite(part) for part in seconds]
    for _ in range(WEIGHT_ROUNDS):
        first, step = (
            np.where(fits, share, np.inf) + weight * np.where(fits, s, 0.0)
            for share, s, fits in zip(shares, seconds, possible, strict=True)
        )
        pieces = _cut(kinds, first, step)
        cost = problem.cost(pieces) if pieces[0].end else np.inf
        if cost <= limits.seconds:
            evened, high = Placement(pieces, cost, best.bound), weight
            if weight == 0.0:
                break
        else:
            low = weight
        weight = (low + high) / 2 if np.isfinite(high) else max(4 * weight, 1e-3 / best.cost)
    return evened


def _cut(kinds: Sequence[int], first: Matrix, step: Matrix) -> tuple[Piece, ...]:
    """The cuts of least cost for a ring of these kinds of machines, in this order."""
    costs, starts = first[kinds[0]], []
    for kind in kinds[1:]:
        through = costs[:, None] + step[kind]
        starts.append(through.argmin(axis=0))
        costs = through.min(axis=0)
    edges = [step.shape[1] - 1]
    for start in reversed(starts):
        edges.append(int(start[edges[-1]]))
    edges.append(0)
    return tuple(
        Piece(kind, a, b) for kind, (a, b) in zip(kinds, pairwise(reversed(edges)), strict=True)
    )
