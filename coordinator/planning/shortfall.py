"""Why a model does not fit, by how many bytes, and the smallest changes that would do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from coordinator.planning import hardware
from coordinator.planning.engines import ENGINES
from coordinator.planning.placement import Layout
from coordinator.planning.pool import Pool
from coordinator.planning.variants import ModelVariants
from unicluster.errors import DoesNotFitError
from unicluster.units import format_bytes

# Bits a weight takes; q: with the scale and bias of its group of 64 (affine quantization).
BITS = {"q2": 2.5, "q3": 3.5, "q4": 4.5, "q6": 6.5, "q8": 8.5}
BITS |= {"bfloat16": 16.0, "float16": 16.0, "float32": 32.0}
# So many machines of a kind are suggested at most.
MOST_BOUGHT = 8


class NoPlanError(DoesNotFitError):
    """No placement fits: by how many bytes on one machine, and changes that would do."""

    def __init__(self, message: str, missing: int, suggestions: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = missing
        self.suggestions = tuple(suggestions)


@dataclass(frozen=True)
class Alternative:
    """A flag that asks for less, and what the model then weighs."""

    flag: str
    variants: ModelVariants


# Of each flag in turn, the smallest change first.
Alternatives = Callable[[ModelVariants], Sequence[Sequence[Alternative]]]


def refusal(
    variants: ModelVariants, pools: Sequence[Pool], model: str, alternatives: Alternatives
) -> NoPlanError:
    """Says by how many bytes a model misses, and the smallest changes that would do.

    `pools`: one for each kind of ring that there may be.
    """
    pool = min(pools, key=_missing)
    layout = pool.layout
    missing, machine = pool.shortfall()
    suggestions = _suggestions(variants, pool, alternatives)
    users = f"{layout.users} user{'s' if layout.users > 1 else ''}"
    asked = f"{model} with context {layout.context} for {users}"
    advice = f"{_either(suggestions)} would do" if suggestions else _NOTHING
    advice = advice[0].upper() + advice[1:]
    if machine is None:
        needed_here = " or ".join(ENGINES[variant.engine].library for variant in variants.layouts)
        text = f"{asked} has no machine to run on: none with {needed_here} is here. {advice}"
        return NoPlanError(text, missing, suggestions)
    machines = pool.machines
    resident = layout.weight_bytes + layout.kv_bytes
    usable = [pool.usable(m) for m in machines]
    offered = sum(usable)
    needed = resident + offered - sum(map(layout.capacity, usable))
    there = "the machine offers" if len(machines) == 1 else f"the {len(machines)} machines offer"
    sizes = f"{asked} needs {format_bytes(needed)} and {there} {format_bytes(offered)}"
    if needed > offered:
        reason = f"{sizes}: {format_bytes(missing)} are missing, in whole layers"
    else:
        more = f"{machine.name} would need {format_bytes(missing)} more"
        reason = f"{sizes}, but no cut between layers fits: {more}"
    return NoPlanError(f"{reason}. {advice}", missing, suggestions)


def _missing(pool: Pool) -> tuple[bool, int]:
    more, machine = pool.shortfall()
    return machine is None, more


_NOTHING = "no single change would do: add machines or choose a smaller model"


def _suggestions(variants: ModelVariants, pool: Pool, alternatives: Alternatives) -> list[str]:
    usable = _round_up(pool.missing_machine())
    suggestions = [f"one more machine with {format_bytes(usable)} usable"]
    if bought := _cheapest(pool):
        suggestions.append(bought)
    for options in alternatives(variants):
        for option in options:
            rings = option.variants.rings()
            if any(Pool(ring, pool.machines, pool.network).fits() for ring in rings):
                suggestions.append(option.flag)
                break
    return suggestions


def _cheapest(pool: Pool) -> str:
    """The machines of the catalogue, all of one kind, that cost least and would do."""
    best: tuple[int, int, str] | None = None
    for box in hardware.boxes().values():
        machine = box.machine()
        for count in range(1, MOST_BOUGHT + 1):
            cost = (box.price * count, count, box.name)
            if not box.price or (best is not None and cost >= best):
                break
            if pool.helped_by(machine, count):
                best = cost
    if best is None:
        return ""
    price, count, name = best
    return f"{f'{count}x ' if count > 1 else 'a '}{name} (${price})"


def scaled(*, quants: bool) -> Alternatives:
    """Alternatives computed without inspecting the model again: sizes in proportion.

    `quants`: whether the weights could be quantized further.
    """

    def options(variants: ModelVariants) -> list[list[Alternative]]:
        fewer = [_smaller_contexts(variants), _fewer_users(variants)]
        return [_smaller_quants(variants), *fewer] if quants else fewer

    return options


def _smaller_quants(variants: ModelVariants) -> list[Alternative]:
    layout = variants.layout
    now = BITS.get(layout.quant, 0.0)
    tried = []
    for quant in ("q8", "q6", "q4", "q3", "q2"):
        scale = BITS[quant] / now if now else 1.0
        if scale < 1:
            layers = tuple(math.ceil(b * scale) for b in layout.layer_bytes)
            head = math.ceil(layout.head_bytes * scale)
            smaller = replace(layout, layer_bytes=layers, head_bytes=head)
            tried.append(Alternative(f"--quant {quant}", replace(variants, layout=smaller)))
    return tried


def _smaller_contexts(variants: ModelVariants) -> list[Alternative]:
    return [
        Alternative(f"--context {context}", variants.map(partial(_for_context, context=context)))
        for context in halves(variants.layout.context, 1024)
    ]


def _for_context(layout: Layout, context: int) -> Layout:
    """A layer with less KV than the fullest has a window: it stays."""
    fullest = max(layout.kv_bytes_per_layer)
    kv = tuple(
        math.ceil(b * context / layout.context) if b == fullest else b
        for b in layout.kv_bytes_per_layer
    )
    return replace(layout, context=context, kv_bytes_per_layer=kv)


def _fewer_users(variants: ModelVariants) -> list[Alternative]:
    return [
        Alternative(f"--users {n}", variants.map(partial(for_users, users=n)))
        for n in halves(variants.layout.users, 1)
    ]


def for_users(layout: Layout, users: int) -> Layout:
    """Layout for another number of users: each has a KV cache of the same size."""
    kv = tuple(b // layout.users * users for b in layout.kv_bytes_per_layer)
    return replace(layout, users=users, kv_bytes_per_layer=kv)


def halves(number: int, least: int) -> list[int]:
    """8192, 4096, ... without `number` itself, down to `least`."""
    numbers = []
    while (number := number // 2) >= least:
        numbers.append(number)
    return numbers


def _round_up(size: int) -> int:
    """Rounds bytes up to three digits, so that the printed figure is enough."""
    unit: int = 10 ** max(0, len(str(size)) - 3)
    return math.ceil(size / unit) * unit


def _either(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} or {last}" if most else last
