"""`unicluster demo`: the whole thing in miniature, on this machine alone."""

import argparse
import asyncio
import signal

from rich.console import Console

from coordinator.commands.serve import served
from coordinator.fleet import local
from coordinator.models.catalog import resolve
from coordinator.planning.placement import Layout
from coordinator.serving.events import Events, Follower
from coordinator.serving.options import ServeOptions
from coordinator.terminal.printer import printing
from unicluster.chat.command import chat
from unicluster.cluster.trust import Cluster
from unicluster.v1.node_pb2 import InspectRequest

MACHINES = ("north", "east", "south")
CONTEXT = 1024
# Of what the model needs in all: three such slices hold it, two do not.
SLICE = 0.42


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="answer this and exit")


def run(args: argparse.Namespace) -> int:
    prompt = " ".join(args.prompt).strip() or None
    events = Events()
    with local.own_cluster() as cluster, printing(events) as printer:
        return asyncio.run(_demo(cluster, prompt, events, printer))


async def _demo(cluster: Cluster, prompt: str | None, events: Events, printer: Follower) -> int:
    console = Console()
    main = asyncio.current_task()
    if main is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    request = InspectRequest(model="demo", context=CONTEXT, users=1)
    layout = Layout.from_proto(await local.inspect(request))
    held = layout.weight_bytes + layout.kv_bytes
    memory = int(SLICE * (held + layout.reserve(held)))
    console.print(
        f"Three agents on this machine, each offering {memory / 1e6:.1f} MB. The demo model "
        f"takes {held / 1e6:.1f} MB with its cache.\n"
    )
    async with local.agents(MACHINES, memory):
        options = ServeOptions(
            source=resolve("demo"), context=CONTEXT, nodes=list(MACHINES), host=local.HOST, port=0
        )
        async with served(options, cluster, events) as running:
            await printer.caught_up()
            console.print()
            await chat(running.address, prompt)
    return 0
