"""`unicluster plan --compare`: what was predicted of the model that is served, and what it does."""

import asyncio
from collections.abc import Sequence

from rich.console import Console

from coordinator.learned import Learned, Measurement
from coordinator.links import Network
from coordinator.members import Members
from coordinator.placement import Layout, Stage
from coordinator.pool import Pool
from coordinator.render import comparison_table
from coordinator.search import Piece
from unicluster.client import Client
from unicluster.errors import UnavailableError
from unicluster.trust import Cluster, Store, default_name
from unicluster.v1.node_pb2 import InspectRequest

PROMPT = "Tell me a tiny story about a fox."
TOKENS = 64


def compare(peers: Sequence[str], console: Console) -> int:
    """Times an answer of the model that is served, and keeps what it teaches.

    Raises UnavailableError when nothing is served, or its machines are not found.
    """
    cluster = Store().require()
    with Client(cluster=cluster) as client:
        model = client.describe().model
        with console.status("Asking for an answer, twice"):
            measured = [_seconds_per_token(client) for _ in range(2)][-1]
    stages, known = asyncio.run(_predicted(cluster, peers, model))
    hops = sum(stage.hop_s for stage in stages)
    computing = sum(stage.seconds_per_token for stage in stages)
    console.print(comparison_table(model, stages, measured))
    # One answer tells the sum: what it is off by is shared among the machines in proportion.
    scale = max(measured - hops, measured / 2) / computing
    for stage in stages:
        taken = Measurement(stage.first, stage.end, stage.seconds_per_token * scale)
        known.record(stage.machine.name, model, taken)
    console.print(f"Kept in {known.path}: plans of {model} on these machines now go by it.")
    return 0


def _seconds_per_token(client: Client) -> float:
    answer = client.chat(PROMPT, temperature=0, max_tokens=TOKENS)
    if answer.usage.completion_tokens < 2:
        raise UnavailableError("the answer was too short to time: ask again")
    return answer.timings.decode_s / (answer.usage.completion_tokens - 1)


async def _predicted(
    cluster: Cluster, peers: Sequence[str], model: str
) -> tuple[tuple[Stage, ...], Learned]:
    """The stages as they are loaded, with the speeds that a plan would predict."""
    async with Members(cluster, cluster.issue(default_name()), peers) as members:
        await members.search()
        machines = await members.machines()
        nodes = await members.nodes()
        held = sorted(
            (
                (spec.first_layer, spec.end_layer, info.name, spec)
                for info, _ in nodes
                for spec in info.stages
            ),
            key=lambda stage: stage[:3],
        )
        if not held:
            raise UnavailableError("no machine of the cluster holds a stage of it")
        spec = held[0][3]
        found = await members.inspect(
            InspectRequest(
                model=spec.model,
                quant=spec.quant,
                context=spec.context,
                users=spec.users,
                kv_bits=spec.kv_bits,
            )
        )
    layout, known = Layout.from_proto(found), Learned.load()
    paced = {m.name: m for m in known.paced(machines, model, layout)}
    used = [paced[name] for _, _, name, _ in held]
    pool = Pool(layout, used, Network(pairs=known.links(used)))
    kinds = [next(i for i, g in enumerate(pool.groups) if m in g) for m in used]
    pieces = [Piece(k, first, end) for k, (first, end, _, _) in zip(kinds, held, strict=True)]
    return pool.stages(pieces), known
