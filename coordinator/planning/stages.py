"""Stages of a ring: bytes on each machine, and predicted seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.planning import devices
from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout, Stage, decode_seconds, prefill_seconds


@dataclass(frozen=True)
class Span:
    """Layers [first, end) on a machine, in the variant in which it loads them."""

    machine: Machine
    first: int
    end: int
    variant: Layout


def stages(network: Network, ring: Sequence[Span]) -> tuple[Stage, ...]:
    """The stages of a ring, the head first. One that is alone has no hop."""
    following, head = [*ring[1:], ring[0]], ring[0].variant
    # Hidden states go round as they come from the head.
    sizes = [*[head.hidden_bytes] * (len(ring) - 1), head.returned_bytes]
    return tuple(
        _stage(span, hop(size, network, span.machine, after.machine))
        for size, span, after in zip(sizes, ring, following, strict=True)
    )


def hop(size: int, network: Network, one: Machine, other: Machine) -> tuple[float, bool]:
    """Seconds for so many bytes between two machines, and whether they were measured."""
    if one.name == other.name:
        return 0.0, False
    link = network.between(one.name, other.name, (one.link, other.link))
    return link.seconds(size), link.measured


def _stage(span: Span, onward: tuple[float, bool]) -> Stage:
    layout, layers, head = span.variant, slice(span.first, span.end), span.first == 0
    outside = layout.head_bytes if head else 0
    weights = sum(layout.layer_bytes[layers])
    kv = sum(layout.kv_bytes_per_layer[layers])
    active = sum(layout.layer_active_bytes[layers])
    read = active + (layout.head_read_bytes if head else 0) + kv / layout.users
    # A further user reads its own KV cache, and experts that nobody has read yet.
    further = kv / layout.users + (weights - active) * active / max(weights, 1)
    return Stage(
        machine=span.machine,
        first=span.first,
        end=span.end,
        weight_bytes=weights + outside,
        kv_bytes=kv,
        reserve_bytes=layout.reserve(weights + outside + kv),
        head=head,
        seconds_per_token=decode_seconds(
            layout, span.machine, read, span.end - span.first, weights + outside + kv
        ),
        batch_seconds=decode_seconds(layout, span.machine, further, 0, weights + outside + kv),
        chunk_seconds=prefill_seconds(
            layout, span.machine, span.first, span.end, layout.chunk_tokens
        ),
        hop_s=onward[0],
        hop_measured=onward[1],
        engine=layout.engine,
        has_lm_head=layout.lm_head_bytes > 0 and span.end == layout.layers,
        shares=devices.shares(
            span.machine.engines[layout.engine],
            layout.capacity,
            layout.needed,
            layout.resident_bytes[layers],
        ),
    )
