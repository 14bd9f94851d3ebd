"""Random small models and fleets, and every placement of one on the other, by brute force."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from coordinator.planning.links import Link, Network
from coordinator.planning.machine import EngineSpeeds, Machine
from coordinator.planning.placement import BANDWIDTH_SHARE, LAYER_S, Layout, Stage
from coordinator.planning.stages import Span, stages
from coordinator.planning.variants import ModelVariants

GB = 10**9


@dataclass(frozen=True)
class Placed:
    """Seconds a token of a placement and of its slowest stage, and how full its fullest machine is.

    ring: which kind of ring of variants it is.
    """

    latency: float
    slowest: float
    fullest: float
    stages: int
    ring: int = 0


@dataclass(frozen=True)
class Case:
    layout: Layout
    machines: list[Machine]
    network: Network
    gguf: Layout | None = None

    @property
    def variants(self) -> ModelVariants:
        return ModelVariants(self.layout, self.gguf)


def a_layout(
    layers: list[int],
    *,
    active: list[int] | None = None,
    head: int = 0,
    kv: list[int] | None = None,
    users: int = 1,
    quant: str = "",
) -> Layout:
    return Layout(
        model_type="llama",
        layer_bytes=tuple(layers),
        layer_active_bytes=tuple(active or layers),
        head_bytes=head,
        kv_bytes_per_layer=tuple(kv or [0] * len(layers)),
        context=8192,
        users=users,
        hidden_bytes=8192,
        quant=quant,
        max_context=0,
    )


def a_machine(
    name: str,
    usable: int,
    bandwidth: float,
    *,
    chip: str = "",
    address: str = "",
    backend: str = "",
    ggml_backend: str = "",
    ggml_bandwidth: float = 0.0,
    slowdown: float = 1.0,
    engines: Sequence[str] = ("mlx", "ggml"),
) -> Machine:
    """A machine with both engines, alike but for the fields of ggml."""
    mlx = EngineSpeeds(bandwidth, backend, slowdown=slowdown)
    ggml = EngineSpeeds(ggml_bandwidth or bandwidth, ggml_backend or backend)
    machine = Machine(name, address, usable, {"mlx": mlx, "ggml": ggml}, chip=chip)
    return machine.only(engines)


def a_ring(**layers: int) -> tuple[Stage, ...]:
    """Stages of so many layers on machines of these names, in order."""
    layout = a_layout([GB] * sum(layers.values()))
    ends = list(accumulate(layers.values()))
    spans = [
        Span(a_machine(name, 99 * GB, 100e9), end - count, end, layout)
        for (name, count), end in zip(layers.items(), ends, strict=True)
    ]
    return stages(Network(), spans)


def a_case(dice: random.Random, most_machines: int, most_layers: int) -> Case:
    """Unequal layers; machines of which some are alike; links of which some are slow."""
    sizes = [dice.randint(1, 30) * GB // 10 for _ in range(dice.randint(1, most_layers))]
    layout = a_layout(
        sizes,
        active=[size // dice.randint(1, 8) for size in sizes],
        head=dice.randint(0, 20) * GB // 10,
        kv=[dice.randint(0, 5) * GB // 10 for _ in sizes],
        users=dice.randint(1, 4),
    )
    whole = sum(layout.resident_bytes) + layout.head_bytes
    kinds = [
        (whole * dice.randint(20, 80) // 100, dice.choice([50, 200, 800]) * GB)
        for _ in range(dice.choice([2, 3, 8]))
    ]
    machines = [
        a_machine(f"m{i}", *dice.choice(kinds), slowdown=dice.choice([1.0, 1.0, 1.5]))
        for i in range(dice.randint(2, most_machines))
    ]
    pairs = {}
    for _ in range(dice.choice([0, 0, 1, 4]) if len(machines) > 1 else 0):
        two = frozenset(m.name for m in dice.sample(machines, 2))
        pairs[two] = Link("odd", dice.choice([0.05e-3, 8e-3, 60e-3]), 1e9)
    default = Link("lan", dice.choice([0.3e-3, 5e-3]), 1e9)
    return Case(layout, machines, Network(default, pairs))


def a_case_of_two_engines(dice: random.Random, most_machines: int, most_layers: int) -> Case:
    """A random case with a GGUF, and machines with either engine or both, of unlike speeds."""
    case = a_case(dice, most_machines, most_layers)
    layout = replace(
        case.layout,
        forbidden_cuts=_some_cuts(dice, case.layout.layers),
        added_lm_head_bytes=dice.choice([0, dice.randint(1, 5) * GB // 10]),
    )
    tail = dice.randint(0, 5) * GB // 10
    sizes = [size * dice.randint(7, 12) // 10 for size in layout.layer_bytes]
    active = [size // dice.randint(1, 8) for size in sizes]
    gguf = replace(
        layout,
        layer_bytes=(*sizes[:-1], sizes[-1] + tail),
        layer_active_bytes=(*active[:-1], active[-1] + tail),
        kv_bytes_per_layer=tuple(dice.randint(0, 5) * GB // 10 for _ in sizes),
        head_bytes=dice.randint(0, 10) * GB // 10,
        hidden_bytes=2 * layout.hidden_bytes,
        forbidden_cuts=_some_cuts(dice, layout.layers),
        engine="ggml",
        lm_head_bytes=tail,
        vocabulary=dice.choice([1_000, 300_000]),
    )
    kinds: list[dict[str, Any]] = [
        {
            "engines": dice.choice([("mlx",), ("ggml",), ("mlx", "ggml"), ("mlx", "ggml")]),
            "ggml_bandwidth": dice.choice([0.0, 100e9, 400e9]),
            "ggml_slowdown": dice.choice([1.0, 1.0, 0.7]),
        }
        for _ in range(dice.choice([1, 2, 3]))
    ]
    machines = [_of_kind(machine, **dice.choice(kinds)) for machine in case.machines]
    return Case(layout, machines, case.network, gguf)


def _of_kind(
    machine: Machine, engines: Sequence[str], ggml_bandwidth: float, ggml_slowdown: float
) -> Machine:
    bandwidth = ggml_bandwidth or machine.engines["mlx"].bandwidth
    ggml = EngineSpeeds(bandwidth, slowdown=ggml_slowdown)
    return machine.with_speeds({"ggml": ggml}).only(engines)


def _some_cuts(dice: random.Random, layers: int) -> tuple[int, ...]:
    return tuple(cut for cut in range(1, layers) if dice.random() < dice.choice([0.0, 0.0, 0.4]))


def every_placement(case: Case) -> Iterator[Placed]:
    """Each placement that fits."""
    for ring, placements in enumerate(_rings(case)):
        yield from (replace(placed, ring=ring) for placed in placements)


def _rings(case: Case) -> Iterator[Iterator[Placed]]:
    layout = case.layout
    yield _placements(case, layout, [layout])
    if case.gguf is not None:
        yield _placements(case, case.gguf, [case.gguf])
        layers, active = list(case.gguf.layer_bytes), list(case.gguf.layer_active_bytes)
        layers[-1] -= case.gguf.lm_head_bytes
        active[-1] -= case.gguf.lm_head_bytes
        apart = (*layout.forbidden_cuts, *case.gguf.forbidden_cuts)
        without = replace(
            case.gguf,
            layer_bytes=tuple(layers),
            layer_active_bytes=tuple(active),
            forbidden_cuts=apart,
        )
        head = replace(layout, forbidden_cuts=apart)
        yield _placements(case, head, [head, without])
        if layout.added_lm_head_bytes:
            more = layout.added_lm_head_bytes
            finished = replace(
                head,
                layer_bytes=(*layout.layer_bytes[:-1], layout.layer_bytes[-1] + more),
                layer_active_bytes=(
                    *layout.layer_active_bytes[:-1],
                    layout.layer_active_bytes[-1] + more,
                ),
            )
            first = replace(case.gguf, forbidden_cuts=apart)
            yield _placements(case, first, [first, finished])


def _placements(case: Case, head: Layout, variants: list[Layout]) -> Iterator[Placed]:
    """Placements whose stages are of these variants, and whose first is of that one."""
    n = head.layers
    figures: dict[tuple[str, int, int], tuple[float, float]] = {}
    for m in case.machines:
        for variant in variants:
            if variant.engine not in m.engines:
                continue
            for a in range(n):
                for b in range(a + 1, n + 1):
                    cut = {a, b} & set(variant.forbidden_cuts)
                    if cut or _needs(variant, a, b) > m.usable or (a == 0 and variant is not head):
                        continue
                    taken = _seconds(variant, m, a, b)
                    known = figures.get((m.name, a, b))
                    if known is None or taken < known[0]:
                        figures[m.name, a, b] = taken, _needs(variant, a, b) / m.usable
    names = [m.name for m in case.machines]
    hop = {
        (one, other): case.network.between(one, other).seconds(head.hidden_bytes)
        for one in names
        for other in names
    }
    returned = 4 * head.vocabulary if head.lm_head_bytes else head.hidden_bytes

    def onward(
        row: tuple[str, ...], first: int, total: float, slowest: float, fullest: float
    ) -> Iterator[Placed]:
        if first == n:
            back = case.network.between(row[-1], row[0]).seconds(returned)
            latency = total + (back if len(row) > 1 else 0.0)
            yield Placed(latency, slowest, fullest, len(row))
            return
        for name in names:
            if name in row:
                continue
            way = hop[row[-1], name] if row else 0.0
            for end in range(first + 1, n + 1):
                if (name, first, end) in figures:
                    taken, share = figures[name, first, end]
                    yield from onward(
                        (*row, name),
                        end,
                        total + way + taken,
                        max(slowest, taken),
                        max(fullest, share),
                    )

    yield from onward((), 0, 0.0, 0.0, 0.0)


def _needs(layout: Layout, first: int, end: int) -> int:
    resident = sum(layout.layer_bytes[first:end]) + sum(layout.kv_bytes_per_layer[first:end])
    resident += layout.head_bytes if first == 0 else 0
    return resident + layout.reserve(resident)


def _seconds(layout: Layout, machine: Machine, first: int, end: int) -> float:
    speeds = machine.engines[layout.engine]
    read = sum(layout.layer_active_bytes[first:end])
    read += sum(layout.kv_bytes_per_layer[first:end]) / layout.users
    read += layout.head_bytes if first == 0 else 0
    seconds = read / (BANDWIDTH_SHARE * speeds.bandwidth) + LAYER_S * (end - first)
    return seconds * speeds.slowdown
