"""Placements for guesses of a draft model: one whose head drafts gets fewer layers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordinator.planning.engines import DEFAULT
from coordinator.planning.placement import Layout, Plan, Stage, decode_seconds, guessing_seconds
from coordinator.planning.pool import Pool
from coordinator.planning.search.cheapest import cheapest
from coordinator.planning.variants import ModelVariants

# Rates of right guesses that are assumed: of a smaller model of the family, and of lookup where a
# text repeats what it has said. No placement is chosen by the second.
DRAFT_RATE = 0.7
LOOKUP_RATE = 0.5
# Limits of the slowest stage that are tried, between the least possible and that of least latency.
LIMITS = 8
ROUNDING = 1e-12


def fills_pipe(plan: Plan, model: ModelVariants, *, auto: bool) -> bool:
    """Whether guesses by lookup can follow one another: copies of recurrent states come with each,
    which llama.cpp does not make, and MLX only where lookup was asked for by name.
    """
    if any(layout.recurrent for layout in model.layouts):
        return len(plan.stages) > 1 and not auto and plan.engines == (DEFAULT,)
    return len(plan.stages) > 1


def draft_seconds(head: Stage, layout: Layout) -> float:
    """Seconds of one drafted token on the head's machine: what reading the draft takes there.

    layout: the head's; 0 where it has no draft.
    """
    if not layout.draft_read_bytes:
        return 0.0
    resident = head.weight_bytes + head.kv_bytes
    return decode_seconds(layout, head.machine, layout.draft_read_bytes, 0, resident)


def with_draft_reads(layout: Layout) -> Layout:
    """Layout whose head reads the draft for each token, as it does while it guesses."""
    return replace(layout, head_active_bytes=layout.head_read_bytes + layout.draft_read_bytes)


def best_for_guesses(pools: Sequence[Pool], rate: float) -> tuple[tuple[Stage, ...], float] | None:
    """The placement of least seconds a token at a rate of right guesses, of those that the limits
    try, and how much better another may be at most. None where none was found.

    pools: of layouts with_draft_reads. The head's seconds are those without the draft.
    """
    found: list[tuple[float, tuple[Stage, ...]]] = []
    trip, slowest = np.inf, np.inf
    for pool in pools:
        quickest = cheapest(pool.problem())
        if quickest is None:
            continue
        least = pool.least_slowest()[0]
        trip, slowest = min(trip, quickest.bound), min(slowest, least)
        longest = max(stage.seconds_per_token for stage in pool.stages(quickest.pieces))
        for limit in np.linspace(least, longest, LIMITS):
            placed = cheapest(pool.problem(float(limit) * (1 + ROUNDING)))
            if placed is None:
                continue
            head, *others = pool.stages(placed.pieces)
            draft = draft_seconds(head, pool.ring.head)
            head = replace(head, seconds_per_token=head.seconds_per_token - draft)
            stages = (head, *others)
            found.append((guessing_seconds(stages, rate, draft), stages))
    if not found:
        return None
    seconds, stages = min(found, key=lambda pair: pair[0])
    # A trip is without the draft, and the bound of one is with it.
    least_s = (1 - rate) * max(trip - draft_seconds(stages[0], pools[0].ring.head), 0.0)
    return stages, max(0.0, 1 - (least_s + rate * slowest) / seconds)
