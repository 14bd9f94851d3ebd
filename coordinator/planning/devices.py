"""A stage on several devices of its machine: llama.cpp's split, with whole layers on each.

The fastest device is filled first, and a further one takes only what is left over: so a stage that
fits into one device is on that alone. All functions take `capacity`, which says how many bytes of
weights and KV fit into so many usable bytes (`Layout.capacity`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.planning.cuts import Matrix
from coordinator.planning.machine import EngineSpeeds

Capacity = Callable[[int], int]


@dataclass(frozen=True)
class Share:
    """A part of a stage on one device: so many layers, and their bytes with the reserve."""

    device: str
    layers: int
    bytes: int


def capacity_of(speeds: EngineSpeeds, capacity: Capacity, largest: int) -> int:
    """Bytes of weights and KV that fit in whole layers into several devices of an engine.

    largest: bytes of the largest layer: on every device but the last one less than that may be
    left over.
    """
    fitting = [capacity(device.usable) for device in speeds.devices]
    return max(*fitting, sum(fitting) - (len(fitting) - 1) * largest)


def slower(
    speeds: EngineSpeeds, capacity: Capacity, resident: "Matrix | float"
) -> "Matrix | float":
    """Factor by which reading takes longer than from the fastest device alone.

    resident: bytes that a stage holds, one number or an array; the result has the same shape.
    """
    if len(speeds.devices) < 2:
        return 1.0
    return _spread(speeds, capacity, resident, [d.bandwidth for d in speeds.devices])


def compute(speeds: EngineSpeeds, capacity: Capacity, resident: float) -> float:
    """Operations per second of a stage that holds so many bytes; 0 if unknown."""
    rates = [device.compute for device in speeds.devices]
    if len(rates) < 2:
        return speeds.compute
    if not all(rates):
        return 0.0
    return rates[0] / float(_spread(speeds, capacity, resident, rates))


def _spread(
    speeds: EngineSpeeds, capacity: Capacity, resident: "Matrix | float", rates: Sequence[float]
) -> "Matrix | float":
    """Time over that at the first rate, where each device works on its part one after another."""
    left = np.maximum(np.where(np.isfinite(resident), resident, 0.0), 1.0)
    whole, time = left, np.zeros_like(left)
    for device, rate in zip(speeds.devices, rates, strict=True):
        part = np.minimum(left, capacity(device.usable))
        time = time + part / rate
        left = left - part
    # What fits nowhere is left: whoever asks looks at that first.
    return (time + left / rates[-1]) / whole * rates[0]


def shares(
    speeds: EngineSpeeds, capacity: Capacity, needed: Capacity, layers: Sequence[int]
) -> tuple[Share, ...]:
    """The devices of a stage with so many bytes of weights and KV in each layer.

    needed: usable bytes for so many of weights and KV. Empty where the devices are not known.
    """
    parts: list[Share] = []
    first = 0
    for number, device in enumerate(speeds.devices, start=1):
        end, room = first, capacity(device.usable)
        last = number == len(speeds.devices)
        while end < len(layers) and (last or sum(layers[first : end + 1]) <= room):
            end += 1
        if end > first:
            parts.append(Share(device.name, end - first, needed(sum(layers[first:end]))))
        first = end
    return tuple(parts)
