"""`unicluster demo`: the whole thing in miniature, on this machine alone."""

import asyncio
import signal
from typing import Any

from coordinator.commands.serve import served
from coordinator.fleet import local
from coordinator.models.catalog import resolve
from coordinator.planning.planner import least_memory
from coordinator.serving.events import Events, Follower
from coordinator.serving.generation_options import generation_options, take_generation
from coordinator.serving.inspected import inspected_here
from coordinator.serving.options import ServeOptions
from coordinator.terminal.printer import printing
from unicluster.chat.command import chat
from unicluster.command_line import Argument, Command
from unicluster.terminal.console import Console
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec

MACHINES = ("north", "east", "south")
CONTEXT = 1024
# Of what the model needs in all: three such slices hold it, two do not.
SLICE = 0.42


def run(prompt: tuple[str, ...], **generation: Any) -> int:
    spec = take_generation(generation)
    words = " ".join(prompt).strip() or None
    events = Events()
    with local.own_cluster() as cluster, printing(events) as printer:
        return asyncio.run(_demo(cluster, words, spec, events, printer))


async def _demo(
    cluster: Cluster, prompt: str | None, spec: StageSpec, events: Events, printer: Follower
) -> int:
    console = Console()
    main = asyncio.current_task()
    if main is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    source = resolve("demo")
    layout = await inspected_here(source, spec, context=CONTEXT)
    resident = layout.weight_bytes + layout.kv_bytes
    # The head's slice has to hold a draft model besides.
    least = least_memory(layout, len(MACHINES))
    memory = max(int(SLICE * (resident + layout.reserve(resident))), least)
    console.print(
        f"Three agents on this machine, each offering {memory / 1e6:.1f} MB. The demo model "
        f"takes {resident / 1e6:.1f} MB with its cache.\n"
    )
    async with local.agents(MACHINES, memory):
        options = ServeOptions(
            source=source,
            context=CONTEXT,
            generation=spec,
            nodes=list(MACHINES),
            host=local.HOST,
            port=0,
        )
        async with served(options, cluster, events) as running:
            await printer.caught_up()
            console.print()
            await chat(running.address, prompt)
    return 0


command = Command(
    run,
    arguments=[Argument("prompt", "answer this and exit", nargs=-1)],
    sections={"Generation": generation_options()},
    examples=["unicluster demo", 'unicluster demo "A tiny story about a fox:" --lookup'],
)
