"""Devices of machines with more than one memory, and of stages on several of them."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from coordinator.planning.machine import Machine
from coordinator.planning.placement import Plan, Stage
from coordinator.terminal.tables import (
    add_names,
    add_numbers,
    add_words,
    layer_range,
    new_table,
    whole,
)
from unicluster.units import format_bytes, format_rate
from unicluster.v1.node_pb2 import NodeInfo


def devices_table(nodes: Iterable[tuple[NodeInfo, str]]) -> Table | None:
    """Devices of engines, for machines that have more than one memory; None: there are none."""
    table = new_table("Devices")
    add_names(table, "machine", "device")
    add_words(table, "engine")
    add_numbers(table, "usable", "of", "bandwidth")
    for info, _ in sorted(nodes, key=lambda node: node[0].name):
        if len({(device.kind, device.total_memory) for device in info.devices}) < 2:
            continue
        for device in info.devices:
            table.add_row(
                whole(info.name),
                whole(f"{device.name}: {device.description}"),
                device.engine,
                format_bytes(device.usable_memory),
                format_bytes(device.total_memory),
                format_rate(device.bandwidth) + (" " if device.bandwidth_measured else "*"),
            )
    return table if table.row_count else None


def usable_cell(machine: Machine) -> Text:
    """The most that an engine reaches there, and below it what others do, if that is less."""
    others = {engine: machine.reach(engine) for engine in machine.engines}
    lines = [
        f"{engine} {format_bytes(size)}" for engine, size in others.items() if size < machine.usable
    ]
    return Text(format_bytes(machine.usable)).append("".join(f"\n{s}" for s in lines), "dim")


def share_lines(plan: Plan) -> list[str]:
    """A line for each stage that is on several devices: `host: CUDA0 0-20, Vulkan0 21-49`."""
    return [_shares(stage) for stage in plan.stages if len(stage.shares) > 1]


def _shares(stage: Stage) -> str:
    first, parts = stage.first, list[str]()
    for share in stage.shares:
        parts.append(f"{share.device} {layer_range(first, first + share.layers)}")
        first += share.layers
    return f"{stage.machine.name}: {', '.join(parts)}"
