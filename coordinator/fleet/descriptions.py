"""Descriptions of machines, checked before any of it is planned with or printed."""

import math
from collections.abc import Iterable

from unicluster.errors import shown
from unicluster.v1.node_pb2 import NodeInfo

# Far above what any machine has: numbers beyond it would only break sums and tables.
MOST_BYTES = 1 << 50
MOST_DEVICES = 64
MOST_CHARACTERS = 200


def nonsense(info: NodeInfo) -> str | None:
    """Which part of a description can't be true, or is not to be printed; None if none is."""
    if len(info.devices) > MOST_DEVICES:
        return f"{len(info.devices)} devices"
    rates = [info.bandwidth, info.ggml_bandwidth, *(each.bandwidth for each in info.devices)]
    for rate in rates:
        if not 0 <= rate <= MOST_BYTES:  # which a NaN is not, either
            return f"a bandwidth of {rate:g} bytes per second"
    if not math.isfinite(info.clock):
        return f"a clock at {info.clock:g}"
    for size in _sizes(info):
        if size > MOST_BYTES:
            return f"a memory of {size} bytes"
    for text in _texts(info):
        if len(text) > MOST_CHARACTERS or not text.isprintable():
            return f"a text of {len(text)} characters that begins with {shown(text[:20])}"
    return None


def _sizes(info: NodeInfo) -> Iterable[int]:
    yield from (info.total_memory, info.usable_memory)
    for device in info.devices:
        yield from (device.total_memory, device.usable_memory)


def _texts(info: NodeInfo) -> Iterable[str]:
    yield from (info.name, info.chip, info.backend, info.version, info.platform)
    yield from (*info.engines, info.ggml_backend)
    for device in info.devices:
        yield from (device.engine, device.name, device.description, device.kind, device.backend)
