"""What stages on given machines hold, and how long they should take."""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.links import Network
from coordinator.placement import Layout, Machine, Stage, prefill_seconds


@dataclass(frozen=True)
class Span:
    """Layers [first, end) on a machine."""

    machine: Machine
    first: int
    end: int


def stages(layout: Layout, network: Network, ring: Sequence[Span]) -> tuple[Stage, ...]:
    """The stages of a ring, the head first. One that is alone has no hop."""
    following = [*ring[1:], ring[0]]
    return tuple(
        _stage(layout, span, hop(layout, network, span.machine, after.machine))
        for span, after in zip(ring, following, strict=True)
    )


def hop(layout: Layout, network: Network, one: Machine, other: Machine) -> tuple[float, bool]:
    """Seconds for a token's hidden state between two machines, and whether they were measured."""
    if one.name == other.name:
        return 0.0, False
    link = network.between(one.name, other.name, (one.link, other.link))
    return link.seconds(layout.hidden_bytes), link.measured


def _stage(layout: Layout, span: Span, onward: tuple[float, bool]) -> Stage:
    machine, layers, head = span.machine, slice(span.first, span.end), span.first == 0
    outside = layout.head_bytes if head else 0
    weights = sum(layout.layer_bytes[layers])
    kv = sum(layout.kv_bytes_per_layer[layers])
    active = sum(layout.layer_active_bytes[layers])
    read = active + (layout.head_read_bytes if head else 0) + kv / layout.users
    # A further user reads its own KV cache, and experts that nobody has read yet.
    further = kv / layout.users + (weights - active) * active / max(weights, 1)
    return Stage(
        machine=machine,
        first=span.first,
        end=span.end,
        weight_bytes=weights + outside,
        kv_bytes=kv,
        reserve_bytes=layout.reserve(weights + outside + kv),
        head=head,
        seconds_per_token=machine.seconds(read, span.end - span.first),
        batch_seconds=machine.seconds(further, 0),
        chunk_seconds=prefill_seconds(layout, machine, span.first, span.end, layout.chunk_tokens),
        hop_s=onward[0],
        hop_measured=onward[1],
    )
