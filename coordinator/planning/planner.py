"""Where each layer goes: a model's layout and machines in, a plan out. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

from coordinator.planning import cuts
from coordinator.planning.balance import EQUAL_SPEED, Limits, balanced
from coordinator.planning.engines import ENGINES, for_checkpoint
from coordinator.planning.filling import best_for_guesses, draft_seconds, with_draft_reads
from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout, Objective, Plan, Stage, guessing_seconds
from coordinator.planning.pool import Pool
from coordinator.planning.search.cheapest import cheapest
from coordinator.planning.search.problem import Placement
from coordinator.planning.shortfall import Alternatives, refusal, scaled
from coordinator.planning.variants import ModelVariants
from unicluster.errors import InputError
from unicluster.units import format_bytes

__all__ = [
    "Layout",
    "Machine",
    "Objective",
    "Plan",
    "Stage",
    "least_memory",
    "plan",
    "split_evenly",
]

AS_STATED = scaled(quants=True)
ANY = Network()
# What sums of the same numbers in another order may differ by.
ROUNDING = 1e-12


def plan(
    layout: Layout | ModelVariants,
    machines: Sequence[Machine],
    objective: Objective = "latency",
    *,
    model: str = "",
    nodes: Sequence[str] | None = None,
    network: Network = ANY,
    alternatives: Alternatives = AS_STATED,
) -> Plan:
    """The best contiguous placement of `layout` on some of `machines`.

    latency: the least seconds a token for one user; of a layout with a draft_rate, on average over
    right and wrong guesses. throughput: the fastest slowest stage, and
    among such plans the one of least latency. Among plans of equal speed it is the most even one
    (`balanced`). Needless machines stay out, because each costs a hop. Of a model in two variants
    each stage takes the one that is faster there, as far as engines may share a ring. Exact for
    any 8 machines; for more, `Plan.gap` says how far from the best it may be. `nodes` names the
    machines that may be used; `model` is how messages call the model.

    Raises InputError for an unknown node or objective, NoPlanError if no cut fits; its message
    says how many bytes are missing and which of the `alternatives` would help.
    """
    if objective not in get_args(Objective):
        raise InputError(f"no objective {objective!r}: it is latency or throughput")
    variants = layout if isinstance(layout, ModelVariants) else ModelVariants(layout)
    asked = machines if nodes is None else _named(nodes, machines)
    engines = [variant.engine for variant in variants.layouts]
    able = [m for m in asked if any(map(m.can, engines))]
    for machine in able:
        if any(machine.engines[e].bandwidth <= 0 for e in engines if machine.can(e)):
            raise InputError(f"{machine.name} states no memory bandwidth: it can't be planned for")

    pools = [Pool(ring, able, network) for ring in variants.rings()]
    fitting = [pool for pool in pools if pool.fits()]
    if not fitting:
        raise refusal(variants, pools, model or variants.layout.model_type, alternatives)
    stages, gap = _best(fitting, objective)
    rate = variants.layout.draft_rate if objective == "latency" else 0.0
    if rate and (better := _for_guesses(stages, variants, able, network, rate)) is not None:
        stages, gap = better
    elif _odd_cut(stages, variants) is not None:
        stages, gap = _without_odd_counts(stages, gap, variants, able, network, objective)
    used = {stage.machine.name for stage in stages}
    left_out = tuple(
        (m, "not among the requested nodes" if m not in asked else _why_out(m, variants, objective))
        for m in machines
        if m.name not in used
    )
    head = next(variant for variant in variants.layouts if variant.engine == stages[0].engine)
    best = Plan(objective, head.users, stages, left_out, head.chunk_tokens, gap)
    if rate and len(stages) > 1:
        best = replace(best, guess_rate=rate, draft_s=draft_seconds(stages[0], head))
    return best


def _for_guesses(
    stages: Sequence[Stage],
    variants: ModelVariants,
    machines: Sequence[Machine],
    network: Network,
    rate: float,
) -> tuple[tuple[Stage, ...], float] | None:
    """A placement by which a draft's guesses fill the pipe better than by `stages`, and its gap."""
    reading = variants.map(with_draft_reads)
    pools = [Pool(ring, machines, network) for ring in reading.rings()]
    better = best_for_guesses([pool for pool in pools if pool.fits()], rate)
    if better is None or len(better[0]) == 1 or _odd_cut(better[0], variants) is not None:
        return None
    layout = variants.layout
    plain, faster = (
        guessing_seconds(placed, rate, draft_seconds(placed[0], layout))
        for placed in (stages, better[0])
    )
    return better if faster < plain * (1 - EQUAL_SPEED) else None


def _without_odd_counts(
    stages: tuple[Stage, ...],
    gap: float,
    variants: ModelVariants,
    machines: Sequence[Machine],
    network: Network,
    objective: Objective,
) -> tuple[tuple[Stage, ...], float]:
    """A placement without stages of a forbidden count: one of their cuts after another is taken.

    Not always the best of them; the gap is to what the best is without that rule.
    Raises InputError when it comes to none.
    """
    least = _objective_seconds(stages, objective) * (1 - gap)
    while (cut := _odd_cut(stages, variants)) is not None:
        variants = variants.map(partial(_without_cut, cut=cut))
        pools = [Pool(ring, machines, network) for ring in variants.rings()]
        fitting = [pool for pool in pools if pool.fits()]
        if not fitting:
            raise InputError(
                f"{variants.layout.model_type}: it fits only with a stage of a number of layers "
                "that llama.cpp takes for another model: use more machines, or others"
            )
        stages, _ = _best(fitting, objective)
    return stages, max(0.0, 1 - least / _objective_seconds(stages, objective))


def _without_cut(variant: Layout, cut: int) -> Layout:
    return replace(variant, forbidden_cuts=tuple(sorted({*variant.forbidden_cuts, cut})))


def _odd_cut(stages: Sequence[Stage], variants: ModelVariants) -> int | None:
    """A cut at an end of a stage of a forbidden count; None if there is no such stage."""
    counts = {variant.engine: variant.forbidden_counts for variant in variants.layouts}
    if len(stages) > 1:
        for stage in stages:
            if stage.end - stage.first in counts[stage.engine]:
                return stage.first or stage.end
    return None


def _objective_seconds(stages: Sequence[Stage], objective: Objective) -> float:
    """Seconds that an objective minimizes."""
    if objective == "throughput":
        return max(stage.seconds_per_token for stage in stages)
    return sum(stage.seconds_per_token + stage.hop_s for stage in stages)


def _best(pools: Sequence[Pool], objective: Objective) -> tuple[tuple[Stage, ...], float]:
    """The best of the placements of each kind of ring, and how much better one may be at most."""
    slowest, proven = math.inf, True
    if objective == "throughput":
        limits = [pool.least_slowest() for pool in pools]
        slowest, proven = min(limits)[0], all(sure for _, sure in limits)
    tried = [(cheapest(pool.problem(slowest * (1 + ROUNDING))), pool) for pool in pools]
    solved = [(result, pool) for result, pool in tried if result is not None]
    if not solved:
        count = max(len(pool.machines) for pool in pools)
        raise InputError(f"{count} machines are too many to search: name some of them with --nodes")
    best, ring = min(solved, key=_cost)
    bound = min(result.bound for result, _ in solved)
    gap = max(0.0, 1 - bound / best.cost)
    if objective == "throughput":
        bound = min(pool.slowest_bound() for pool in pools) if not proven else slowest
        gap = 1 - bound / slowest
    bounds = Limits(best.cost * (1 + EQUAL_SPEED), len(best.pieces), slowest * (1 + ROUNDING))
    return ring.stages(balanced(ring, bounds, best).pieces), gap


def _cost(pair: tuple[Placement, Pool]) -> float:
    return pair[0].cost


def split_evenly(layout: Layout, count: int) -> list[tuple[int, int]]:
    """Cuts the layers into exactly `count` ranges [first, end) whose largest is smallest.

    In bytes of weights and KV, the first range holding the head's. Raises InputError if the
    model can't be cut into so many.
    """
    most = layout.layers - len(layout.forbidden_cuts)
    if not 1 <= count <= most:
        raise InputError(
            f"can't cut {layout.layers} layers into {count} stages"
            + (f": {layout.model_type} allows at most {most}" if layout.forbidden_cuts else "")
        )
    return cuts.split_evenly(layout.resident_bytes, layout.head_bytes, count, layout.forbidden_cuts)


def least_memory(layout: Layout, count: int) -> int:
    """Usable bytes of each of `count` alike machines that hold the model, and fewer don't.

    (Fewer may, where the largest of their ranges is no larger.)
    """
    ranges = split_evenly(layout, count)
    resident = [sum(layout.resident_bytes[first:end]) for first, end in ranges]
    resident[0] += layout.head_bytes
    return layout.needed(max(resident))


def _named(nodes: Sequence[str], machines: Sequence[Machine]) -> list[Machine]:
    known = {m.name for m in machines}
    for name in nodes:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise InputError(f"no machine named {name!r}: there are {there}")
    return [m for m in machines if m.name in nodes]


def _why_out(machine: Machine, variants: ModelVariants, objective: Objective) -> str:
    able = [variant for variant in variants.layouts if machine.can(variant.engine)]
    if not able:
        return _why_unable(machine, variants)
    least = [(variant.needed(min(variant.resident_bytes)), variant) for variant in able]
    if all(variant.usable_on(machine) < needed for needed, variant in least):
        needed, variant = min(least, key=lambda pair: pair[0])
        usable = format_bytes(max(0, variant.usable_on(machine)))
        return f"{usable} usable, and a layer needs {format_bytes(needed)}"
    return "not needed: " + (
        "with it a token would take longer"
        if objective == "latency"
        else "the slowest stage would be no faster"
    )


def _why_unable(machine: Machine, variants: ModelVariants) -> str:
    gguf = for_checkpoint(gguf=True)
    if machine.can(gguf.name):
        return (
            f"offers only {gguf.title} ({gguf.library}), and the model is no GGUF: "
            "give it one with --gguf"
        )
    return ENGINES[variants.layout.engine].missing
