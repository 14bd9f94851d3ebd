"""`unicluster.load`: any model on several processes or machines, as an ordinary mlx-lm model."""

from collections.abc import Sequence
from typing import Any

from unicluster.errors import InputError


def load(
    model: str,
    *,
    local_nodes: int | None = None,
    nodes: Sequence[str] | None = None,
    quant: str = "",
) -> tuple[Any, Any]:
    """A model and its tokenizer for any mlx-lm function; this process becomes the head.

    Args:
        model: a directory, a GGUF, a hub repository id, a catalogue name, or "demo".
        local_nodes: cut the model into that many stages on this machine; this process holds
            the first, worker processes the others.
        nodes: agents to put stages on besides this process, each `HOST:PORT` or the name of
            a machine of this cluster; this process holds the first stage.
        quant: q2, q3, q4, q6 or q8 to quantize on load; default as stored.

    Returns `(model, tokenizer)`. The model gives the same logits as the whole model. Its
    `close()`, or the end of the process, frees the memory everywhere.

    Raises InputError, NotFoundError, DoesNotFitError, StageError or UnavailableError.

    Example:
        >>> model, tokenizer = unicluster.load("demo", local_nodes=3)
        >>> mlx_lm.generate(model, tokenizer, "What is 2 + 3?")
    """
    if (local_nodes is None) == (nodes is None):
        raise InputError("load: give either local_nodes=N or nodes=[...]")
    from coordinator.models.catalog import resolve

    source = resolve(model, quant or None)
    if nodes is not None:
        return _on_nodes(source.model, source.quant, nodes)
    from coordinator.planning.placement import Layout
    from coordinator.planning.planner import split_evenly
    from node.engines.choose import choose
    from node.inprocess.loader import describe_here, load_local
    from unicluster.trust.cluster import Cluster
    from unicluster.trust.identity import YEAR
    from unicluster.v1.node_pb2 import InspectRequest

    identity = Cluster.new().issue("local", YEAR)  # of this process alone
    checkpoint = describe_here(source.model, identity)
    layout = Layout.from_proto(
        choose(checkpoint).inspect(checkpoint, InspectRequest(quant=source.quant))
    )
    if local_nodes is None or not 1 <= local_nodes <= layout.layers:
        raise InputError(f"local_nodes: between 1 and {layout.layers}, the layers of {model}")
    cuts = split_evenly(layout, local_nodes)
    return load_local(checkpoint, source.quant, cuts, identity)


def _on_nodes(model: str, quant: str, nodes: Sequence[str]) -> tuple[Any, Any]:
    import asyncio

    from coordinator.fleet.in_order import cut_in_order, find
    from coordinator.planning.machine import Machine
    from coordinator.planning.placement import Layout
    from coordinator.serving.sourcing import hub_files
    from node.agent.ledger import Ledger, as_proto
    from node.agent.probe import probe
    from node.engines.choose import choose
    from node.inprocess.loader import describe_here, load_on_nodes
    from unicluster.trust.identity import default_name
    from unicluster.trust.keyring import Keyring, Membership
    from unicluster.trust.store import Store
    from unicluster.v1.node_pb2 import InspectRequest, NodeInfo
    from unicluster.v1.stage_pb2 import RouteStop

    if not nodes:
        raise InputError("nodes: name at least one agent")
    cluster = Store().require()
    identity = Keyring.of_member(Membership(cluster, Store()), default_name())
    machines = find(cluster, identity, nodes)
    addresses = [machine.address for machine in machines]
    checkpoint = describe_here(model, identity, addresses)
    inspected = choose(checkpoint).inspect(checkpoint, InspectRequest(quant=quant))
    hardware = probe()
    offers = Ledger(hardware, None).usable([])
    described = NodeInfo(
        name="this machine", devices=[as_proto(device, usable) for device, usable in offers]
    )
    here = Machine.from_proto(described, "")
    cuts = cut_in_order(Layout.from_proto(inspected), [here, *machines])
    manifest = checkpoint.manifest
    available = [name for name in manifest.weights if checkpoint.is_whole(name)]
    from_hub = asyncio.run(
        hub_files(
            manifest.model,
            manifest.revision,
            inspected.files,
            cuts,
            ["", *addresses],
            addresses,
            identity,
            available,
        )
    )
    stops = [
        RouteStop(node=m.name, address=m.address, addresses=m.addresses, machine=m.id)
        for m in machines
    ]
    return load_on_nodes(checkpoint, quant, cuts, stops, identity, from_hub)
