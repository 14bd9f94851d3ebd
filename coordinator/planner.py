"""Where each layer goes: a model's layout and machines in, a plan out. Pure functions."""

import math
from collections.abc import Sequence
from typing import get_args

from coordinator import cuts
from coordinator.links import Network
from coordinator.placement import Layout, Machine, Objective, Plan, Stage
from coordinator.pool import Pool
from coordinator.search import cheapest
from coordinator.shortfall import Alternatives, refusal, scaled
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


def plan(
    layout: Layout,
    machines: Sequence[Machine],
    objective: Objective = "latency",
    *,
    model: str = "",
    nodes: Sequence[str] | None = None,
    network: Network = ANY,
    alternatives: Alternatives = AS_STATED,
) -> Plan:
    """The best contiguous placement of `layout` on some of `machines`.

    latency: the least seconds a token for one user. throughput: the fastest slowest stage, and
    among such plans the one of least latency. Needless machines stay out, because each costs a
    hop. Exact for any 8 machines; for more, `Plan.gap` says how far from the best it may be.
    `nodes` names the machines that may be used; `model` is how messages call the model.

    Raises InputError for an unknown node or objective, NoPlanError if no cut fits; its message
    says how many bytes are missing and which of the `alternatives` would help.
    """
    if objective not in get_args(Objective):
        raise InputError(f"no objective {objective!r}: it is latency or throughput")
    asked = machines if nodes is None else _named(nodes, machines)
    able = [m for m in asked if m.backend != "none"]
    for machine in able:
        if machine.bandwidth <= 0:
            raise InputError(f"{machine.name} states no memory bandwidth: it can't be planned for")

    pool = Pool(layout, able, network)
    if not pool.fits():
        raise refusal(layout, pool, model or layout.model_type, alternatives)
    slowest, proven = pool.least_slowest() if objective == "throughput" else (math.inf, True)
    found = cheapest(pool.problem(slowest))
    if found is None:
        raise InputError(
            f"{len(able)} machines are too many to search: name some of them with --nodes"
        )
    stages = pool.stages(found.pieces)
    gap = 1 - found.bound / found.cost
    if objective == "throughput":
        gap = 0.0 if proven else 1 - pool.slowest_bound() / slowest
    used = {stage.machine.name for stage in stages}
    left_out = tuple(
        (m, "not among the nodes asked for" if m not in asked else _why_out(m, layout, objective))
        for m in machines
        if m.name not in used
    )
    return Plan(objective, layout.users, stages, left_out, layout.chunk_tokens, gap)


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
    return cuts.split_evenly(layout.held_bytes, layout.head_bytes, count, layout.forbidden_cuts)


def least_memory(layout: Layout, count: int) -> int:
    """Usable bytes of each of `count` alike machines that hold the model, and fewer don't.

    (Fewer may, where the largest of their ranges is no larger.)
    """
    ranges = split_evenly(layout, count)
    held = [sum(layout.held_bytes[first:end]) for first, end in ranges]
    held[0] += layout.head_bytes
    return layout.needed(max(held))


def _named(nodes: Sequence[str], machines: Sequence[Machine]) -> list[Machine]:
    known = {m.name for m in machines}
    for name in nodes:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise InputError(f"no machine named {name!r}: there are {there}")
    return [m for m in machines if m.name in nodes]


def _why_out(machine: Machine, layout: Layout, objective: Objective) -> str:
    smallest = min(layout.held_bytes)
    if machine.backend == "none":
        return "has no MLX installed"
    if layout.capacity(machine.usable) < smallest:
        needed = format_bytes(layout.needed(smallest))
        return f"{format_bytes(machine.usable)} usable, and a layer needs {needed}"
    return "not needed: " + (
        "with it a token would take longer"
        if objective == "latency"
        else "the slowest stage would be no faster"
    )
