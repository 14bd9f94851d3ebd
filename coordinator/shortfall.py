"""Why a model does not fit, by how many bytes, and the smallest changes that would do."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordinator.placement import Layout
from coordinator.pool import Pool
from unicluster.units import format_bytes

# Bits a weight takes; q: with the scale and bias of its group of 64 (affine quantization).
BITS = {"q2": 2.5, "q3": 3.5, "q4": 4.5, "q6": 6.5, "q8": 8.5}
BITS |= {"bfloat16": 16.0, "float16": 16.0, "float32": 32.0}


def refusal(layout: Layout, pool: Pool, model: str) -> str:
    """Says by how many bytes a model misses, and the smallest changes that would do."""
    advice = _advice(layout, pool)
    users = f"{layout.users} user{'s' if layout.users > 1 else ''}"
    asked = f"{model} with context {layout.context} for {users}"
    machines = pool.machines
    if not machines:
        return f"{asked} has no machine to run on: none with MLX is here. {advice}"
    held = layout.weight_bytes + layout.kv_bytes
    capacity = sum(layout.capacity(m.usable) for m in machines)
    offered = sum(m.usable for m in machines)
    needed = held + offered - capacity
    there = "the machine offers" if len(machines) == 1 else f"the {len(machines)} machines offer"
    sizes = f"{asked} needs {format_bytes(needed)} and {there} {format_bytes(offered)}"
    if held > capacity:
        return f"{sizes}: {format_bytes(held - capacity)} are missing. {advice}"
    nearest = pool.stages(pool.cut(np.add, pool.overflow()) or [])
    short = {s.machine.name: -s.free_bytes for s in nearest if s.free_bytes < 0}
    where = _and(list(short)) if len(short) <= 3 else f"{len(short)} machines"
    missed = f"{format_bytes(sum(short.values()))} on {where}"
    return f"{sizes}, but no cut between layers fits: the nearest misses {missed}. {advice}"


def _advice(layout: Layout, pool: Pool) -> str:
    """The smallest changes that would do, each one tried."""
    changes = []
    held = pool.missing_machine()
    if held is not None:
        usable = _round_up(held + layout.reserve(held))
        changes.append(f"one more machine with {format_bytes(usable)} usable")
    for flag, values in (
        ("--quant", _smaller_quants(layout)),
        ("--context", _smaller_contexts(layout)),
        ("--users", _fewer_users(layout)),
    ):
        for value, smaller in values:
            if Pool(smaller, pool.machines).fits():
                changes.append(f"{flag} {value}")
                break
    if not changes:
        return "No single change would do: add machines or choose a smaller model"
    text = f"{_and(changes, 'or')} would do"
    return text[0].upper() + text[1:]


def _smaller_quants(layout: Layout) -> list[tuple[str, Layout]]:
    now = BITS.get(layout.quant, 0.0)
    tried = []
    for quant in ("q8", "q6", "q4", "q3", "q2"):
        scale = BITS[quant] / now if now else 1.0
        if scale < 1:
            layers = tuple(math.ceil(b * scale) for b in layout.layer_bytes)
            head = math.ceil(layout.head_bytes * scale)
            tried.append((quant, replace(layout, layer_bytes=layers, head_bytes=head)))
    return tried


def _smaller_contexts(layout: Layout) -> list[tuple[int, Layout]]:
    """Halves, down to 1024. A layer with less KV than the fullest has a window: it stays."""
    fullest = max(layout.kv_bytes_per_layer)
    tried = []
    context = layout.context // 2
    while context >= 1024:
        kv = tuple(
            math.ceil(b * context / layout.context) if b == fullest else b
            for b in layout.kv_bytes_per_layer
        )
        tried.append((context, replace(layout, context=context, kv_bytes_per_layer=kv)))
        context //= 2
    return tried


def _fewer_users(layout: Layout) -> list[tuple[int, Layout]]:
    tried = []
    users = layout.users // 2
    while users >= 1:
        kv = tuple(math.ceil(b * users / layout.users) for b in layout.kv_bytes_per_layer)
        tried.append((users, replace(layout, users=users, kv_bytes_per_layer=kv)))
        users //= 2
    return tried


def _round_up(size: int) -> int:
    """To three digits, so that the printed figure is enough."""
    unit: int = 10 ** max(0, len(str(size)) - 3)
    return math.ceil(size / unit) * unit


def _and(parts: Sequence[str], word: str = "and") -> str:
    *most, last = parts
    return f"{', '.join(most)} {word} {last}" if most else last
