"""Plans that a person might have expected instead, and why they are not the one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Objective, Plan
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import NoPlanError
from coordinator.planning.variants import ModelVariants
from unicluster.units import format_ms

MOST = 3
# What is nearer than that is the same plan by other names.
NOTICEABLE = 1e-3


@dataclass(frozen=True)
class Rival:
    """Another plan that fits, and the reason that it lost."""

    plan: Plan
    reason: str


def rivals(
    variants: ModelVariants, machines: Sequence[Machine], best: Plan, network: Network
) -> list[Rival]:
    """The nearest of: the other objective's plan, one machine alone, each machine left out, and
    each engine alone."""
    others: dict[tuple[object, ...], Plan] = {}
    for variant, names, objective in _ideas(variants, machines, best):
        try:
            other = plan(
                variant,
                machines,
                objective,
                nodes=names,
                network=network,
                alternatives=lambda _: (),
            )
        except NoPlanError:
            continue
        more = _score(other, best.objective) / _score(best, best.objective) - 1
        if _shape(other) != _shape(best) and more > NOTICEABLE:
            others.setdefault(_shape(other), other)
    ranked = sorted(others.values(), key=lambda other: _score(other, best.objective))
    return [Rival(other, _reason(other, best)) for other in ranked[:MOST]]


def _ideas(
    variants: ModelVariants, machines: Sequence[Machine], best: Plan
) -> Iterator[tuple[ModelVariants, list[str], Objective]]:
    able = [m for m in machines if any(m.can(variant.engine) for variant in variants.layouts)]
    names = [m.name for m in able]
    yield variants, names, "throughput" if best.objective == "latency" else "latency"
    for variant in variants.layouts if len(variants.layouts) > 1 else ():
        yield ModelVariants(variant), names, best.objective
    used = {_kind(stage.machine): stage.machine for stage in best.stages}
    for machine in {_kind(m): m for m in able}.values():
        yield variants, [machine.name], best.objective
    for machine in used.values():
        if others := [m.name for m in able if _kind(m) != _kind(machine)]:
            yield variants, others, best.objective


def _kind(machine: Machine) -> tuple[object, ...]:
    figures = (
        (e, machine.reach(e), s.backend, s.bandwidth, s.slowdown, len(s.devices))
        for e, s in machine.engines.items()
    )
    return machine.link, *figures


def _shape(candidate: Plan) -> tuple[object, ...]:
    """Key by which plans differ: alike machines make no difference."""
    return tuple((_kind(stage.machine), stage.engine, stage.first) for stage in candidate.stages)


def _machines(candidate: Plan) -> set[str]:
    return {stage.machine.name for stage in candidate.stages}


def _score(candidate: Plan, objective: Objective) -> float:
    return (
        candidate.seconds_per_token
        if objective == "latency"
        else candidate.slowest.seconds_per_token
    )


def _reason(other: Plan, best: Plan) -> str:
    """Reason why a plan loses against the best, with milliseconds."""
    more = _score(other, best.objective) - _score(best, best.objective)
    if best.objective == "throughput":
        slowest = other.slowest
        return (
            f"its slowest stage, {slowest.machine.name}, takes {format_ms(more)} ms per token more"
        )
    if other.engines != best.engines and _machines(other) == _machines(best):
        return f"{format_ms(more)} ms per token more: {' and '.join(other.engines)} only"
    hops = other.hops_s - best.hops_s
    if hops >= more / 2:
        stages = len(other.stages) - len(best.stages)
        count = f"{stages} hop{'s' if stages > 1 else ''} more" if stages > 0 else "slower hops"
        return f"{format_ms(more)} ms per token more: {count}"
    return f"{format_ms(more)} ms per token more: more layers on slower memory"
