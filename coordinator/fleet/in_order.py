"""Placement for `unicluster.load(nodes=[...])`: the caller first, then the machines as named."""

import asyncio
from collections.abc import Sequence

import numpy as np

from coordinator.fleet.members import Members
from coordinator.planning.costs import Costs
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout
from unicluster.errors import DoesNotFitError, InputError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Credentials
from unicluster.units import format_bytes


def find(cluster: Cluster, identity: Credentials, nodes: Sequence[str]) -> list[Machine]:
    """The machines meant by `nodes`, addresses or names, in that order.

    Raises UnavailableError for one that does not answer.
    """
    return asyncio.run(_find(cluster, identity, nodes))


def cut_in_order(layout: Layout, machines: Sequence[Machine]) -> list[tuple[int, int]]:
    """One range of layers for each machine, in that order, of the least seconds a token.

    Raises DoesNotFitError when there is none, InputError when a machine has not the engine.
    """
    for machine in machines:
        if not machine.can(layout.engine):
            raise InputError(f"nodes: {machine.name} does not offer {layout.engine}")
    speeds = [Costs(layout).seconds(machine) for machine in machines]
    costs = [(row.head, row.rest) for row in speeds]
    rows = [costs[0][0]]
    for _, step in costs[1:]:
        rows.append((rows[-1][:, None] + step).min(axis=0))
    if not np.isfinite(rows[-1][-1]):
        room = sum(machine.reach(layout.engine) for machine in machines)
        raise DoesNotFitError(
            f"{layout.model_type} needs {format_bytes(layout.weight_bytes + layout.kv_bytes)} and "
            f"no cut of it fits these machines in this order, which offer {format_bytes(room)}"
        )
    ranges: list[tuple[int, int]] = []
    end = layout.layers
    for row, (_, step) in zip(reversed(rows[:-1]), reversed(costs[1:]), strict=True):
        start = int((row + step[:, end]).argmin())
        ranges.append((start, end))
        end = start
    return [(0, end), *reversed(ranges)]


async def _find(cluster: Cluster, identity: Credentials, nodes: Sequence[str]) -> list[Machine]:
    addresses = [node for node in nodes if ":" in node]
    names = [node for node in nodes if ":" not in node]
    async with Members(cluster, identity, addresses) as members:
        if names:
            await members.search(names)
        machines = await members.machines()
    chosen = []
    for node in nodes:
        matching = [m for m in machines if node in (m.name, m.address, *m.addresses)]
        if not matching:
            raise InputError(f"nodes: no machine {node} of this cluster answers")
        chosen.append(matching[0])
    return chosen
