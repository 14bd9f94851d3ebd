"""`unicluster plan --compare`: predicted and measured times of the model that is served."""

import asyncio
from collections.abc import Sequence

from rich.console import Console

from coordinator.fleet.measured import Measurements, token_times
from coordinator.fleet.members import Members
from coordinator.planning.engines import ENGINES
from coordinator.planning.placement import Layout, Stage
from coordinator.planning.stages import Span, stages
from coordinator.planning.variants import ModelVariants
from coordinator.terminal.plan import comparison_table
from unicluster.client.answers import ChatInfo, ServedStage
from unicluster.client.client import Client
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import default_name
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import InspectRequest, StageSpec

PROMPT = "Tell me a tiny story about a fox."
TOKENS = 64


def compare(peers: Sequence[str], console: Console) -> int:
    """Times an answer of the model that is served, and stores the measurements.

    Raises UnavailableError when nothing is served, or its machines are not found.
    """
    cluster = Store().require()
    with Client(cluster=cluster) as client:
        served = client.describe()
        if not served.stages:
            raise UnavailableError(f"{served.model} is {served.state}: {served.detail}")
        predicted = asyncio.run(_predicted(cluster, peers, served))
        with console.status("Asking for an answer, twice"):
            seconds = [_seconds_per_token(client) for _ in range(2)][-1]
        metrics = client.measure()
    measured = token_times(
        predicted,
        [stage.decode_s for stage in metrics.stages],
        [hop.decode_s for hop in metrics.hops],
        seconds,
    )
    console.print(comparison_table(served.model, predicted, measured))
    known = Measurements.record(served.model, predicted, measured)
    console.print(f"Stored in {known.path}: plans of {served.model} on these machines now use it.")
    return 0


def _seconds_per_token(client: Client) -> float:
    speed = client.chat(PROMPT, temperature=0, max_tokens=TOKENS).timings.tokens_per_s
    if not speed:
        raise UnavailableError("the answer was too short to time: ask again")
    return 1 / speed


async def _predicted(cluster: Cluster, peers: Sequence[str], served: ChatInfo) -> tuple[Stage, ...]:
    """The stages as they are loaded, with the speeds that a plan would predict."""
    async with Members(cluster, cluster.issue(default_name()), peers) as members:
        await members.search()
        specs = {info.name: list(info.stages) for info, _ in await members.nodes()}
        machines = {machine.name: machine for machine in await members.machines()}
        if missing := [stage.node for stage in served.stages if stage.node not in machines]:
            raise UnavailableError(f"machine {missing[0]}, which holds a stage, does not answer")
        layouts: dict[str, Layout] = {}
        for stage in served.stages:
            if stage.engine not in layouts:
                spec = _spec(specs, stage)
                request = InspectRequest(
                    model=spec.model,
                    quant=spec.quant,
                    context=spec.context,
                    users=spec.users,
                    revision=spec.revision,
                    sources=[machine.address for machine in machines.values()],
                    kv_bits=spec.kv_bits,
                )
                layouts[stage.engine] = Layout.from_proto(await members.inspect(request))
    head = ENGINES[served.stages[0].engine]
    ended = Layout.without_lm_head if head.head_makes_logits else Layout.with_lm_head
    ring_layouts = [ended(layout) for layout in layouts.values()]
    variants = ModelVariants(ring_layouts[0], ring_layouts[1] if len(ring_layouts) > 1 else None)
    used = [machines[stage.node] for stage in served.stages]
    fleet = Measurements.load().fleet(used, served.model, variants)
    by_engine = {variant.engine: variant for variant in variants.layouts}
    ring = [
        Span(machine, stage.first_layer, stage.end_layer, by_engine[stage.engine])
        for machine, stage in zip(fleet.machines, served.stages, strict=True)
    ]
    return stages(fleet.network, ring)


def _spec(specs: dict[str, list[StageSpec]], stage: ServedStage) -> StageSpec:
    """Spec of a stage, as its machine loaded it."""
    for spec in specs[stage.node]:
        if (spec.first_layer, spec.end_layer) == (stage.first_layer, stage.end_layer):
            return spec
    raise UnavailableError(f"machine {stage.node} no longer holds its stage")
