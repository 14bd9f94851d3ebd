"""Plans after a loss: stages that stay where they are need not load again. Pure functions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, permutations

from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Plan, Stage
from coordinator.planning.stages import Span, stages
from coordinator.planning.variants import ModelVariants

# How much slower a plan may be, at most, by which less is loaded.
WORSE = 0.1
# Ways of replacing lost machines by others that are looked at.
MOST_WAYS = 5000


def keeping(
    best: Plan,
    served: Sequence[Stage],
    variants: ModelVariants,
    machines: Sequence[Machine],
    network: Network,
    worse: float = WORSE,
) -> Plan:
    """`best`, or a plan at most `worse` by which more bytes of `served` stay on their machines.

    Other machines take the ranges of those that are lost, or their neighbours in the ring do.
    """
    spans = _spans(served, variants)
    if spans is None:
        return best
    there = {machine.name: machine for machine in machines}
    spans = [replace(s, machine=there.get(s.machine.name, s.machine)) for s in spans]
    lost = [i for i, s in enumerate(spans) if s.machine.name not in there or not _fits(s)]
    limit, chosen, most = seconds(best) * (1 + worse), best, _kept(best.stages, served)
    for ring in _rings(spans, lost, machines):
        if all(map(_fits, ring)) and not _has_odd_count(ring):
            plan = replace(best, stages=stages(network, ring))
            kept = _kept(plan.stages, served)
            better = kept > most or (kept == most and seconds(plan) < seconds(chosen))
            if better and seconds(plan) <= limit:
                chosen, most = plan, kept
    return chosen if chosen is best else _with_left_out(chosen, best, machines)


def standing(
    best: Plan,
    served: Sequence[Stage],
    variants: ModelVariants,
    machines: Sequence[Machine],
    network: Network,
) -> Plan | None:
    """The plan that stands, at the speeds that its machines have now; None without all of them.

    `best`: the best plan at those speeds.
    """
    spans, there = _spans(served, variants), {machine.name: machine for machine in machines}
    if spans is None or any(span.machine.name not in there for span in spans):
        return None
    ring = [replace(span, machine=there[span.machine.name]) for span in spans]
    if not all(span.machine.can(span.variant.engine) for span in ring):
        return None
    return _with_left_out(replace(best, stages=stages(network, ring)), best, machines)


def _spans(served: Sequence[Stage], variants: ModelVariants) -> list[Span] | None:
    """The ranges of stages in their variants; None where there is no such ring any more."""
    for ring in variants.rings() if served else ():
        by_engine = {variant.engine: variant for variant in ring.variants}
        if ring.head.engine != served[0].engine or any(s.engine not in by_engine for s in served):
            continue
        last = by_engine[served[-1].engine]
        if (last.lm_head_bytes > 0) == served[-1].has_lm_head and last.layers == served[-1].end:
            return [Span(s.machine, s.first, s.end, by_engine[s.engine]) for s in served]
    return None


def _rings(
    spans: Sequence[Span], lost: Sequence[int], machines: Sequence[Machine]
) -> Iterator[list[Span]]:
    """Rings without the lost machines, in which most of the others keep their ranges."""
    used = {span.machine.name for span in spans}
    spare = [machine for machine in machines if machine.name not in used]
    for others in islice(permutations(spare, len(lost)), MOST_WAYS):
        ring = list(spans)
        for index, machine in zip(lost, others, strict=True):
            ring[index] = replace(ring[index], machine=machine)
        yield ring
    if len(lost) == 1 and len(spans) > 1:
        yield from _shared(spans, lost[0])


def _shared(spans: Sequence[Span], lost: int) -> Iterator[list[Span]]:
    """Rings in which the neighbours of a lost stage have its layers, cut anywhere."""
    before, gone, after = spans[:lost], spans[lost], spans[lost + 1 :]
    for cut in range(gone.first, gone.end + 1):
        ring = [*before, *after]
        if (cut > gone.first and not before) or (cut < gone.end and not after):
            continue
        if gone.first < cut < gone.end and cut in gone.variant.forbidden_cuts:
            continue
        if before:
            ring[lost - 1] = replace(before[-1], end=cut)
        if after:
            ring[lost] = replace(after[0], first=cut)
        yield ring


def _fits(span: Span) -> bool:
    variant, machine = span.variant, span.machine
    if not machine.can(variant.engine):
        return False
    resident = sum(variant.resident_bytes[span.first : span.end])
    resident += 0 if span.first else variant.head_bytes
    return variant.needed(resident) <= variant.usable_on(machine)


def _has_odd_count(ring: Sequence[Span]) -> bool:
    return len(ring) > 1 and any(s.end - s.first in s.variant.forbidden_counts for s in ring)


def seconds(plan: Plan) -> float:
    """Seconds that the plan's objective minimizes."""
    if plan.objective == "throughput":
        return plan.slowest.seconds_per_token
    return plan.seconds_per_token


def _kept(now: Sequence[Stage], served: Sequence[Stage]) -> int:
    """Bytes of weights that need not be loaded."""
    before = {_range(stage) for stage in served}
    return sum(stage.weight_bytes for stage in now if _range(stage) in before)


def _range(stage: Stage) -> tuple[str, str, int, int, bool]:
    return stage.machine.name, stage.engine, stage.first, stage.end, stage.has_lm_head


def _with_left_out(plan: Plan, best: Plan, machines: Sequence[Machine]) -> Plan:
    """The plan with a reason for each machine that it leaves out."""
    used = {stage.machine.name for stage in plan.stages}
    reasons = {machine.name: reason for machine, reason in best.left_out}
    others = "not needed: without it fewer layers are loaded again"
    left_out = [(m, reasons.get(m.name, others)) for m in machines if m.name not in used]
    return replace(plan, left_out=tuple(left_out))
