"""`unicluster demo`: the whole thing in miniature, on this machine alone."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator

from rich.console import Console

from coordinator.catalog import resolve
from coordinator.placement import Layout
from coordinator.serve import ServeOptions, served
from unicluster.chat_ui import chat
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust import Cluster, Store
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

MACHINES = ("north", "east", "south")
HOST = "127.0.0.1"
CONTEXT = 1024
# Of what the model needs in all: three such slices hold it, two do not.
SLICE = 0.42
STOP_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="answer this and exit")


def run(args: argparse.Namespace) -> int:
    prompt = " ".join(args.prompt).strip() or None
    with tempfile.TemporaryDirectory(prefix="unicluster-demo-") as home:
        # A cluster of its own: the demo touches nothing of the machine's real one.
        os.environ["UNICLUSTER_HOME"] = home
        try:
            return asyncio.run(_demo(Store().create(), prompt))
        finally:
            del os.environ["UNICLUSTER_HOME"]


async def _demo(cluster: Cluster, prompt: str | None) -> int:
    console = Console()
    main = asyncio.current_task()
    if main is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    layout = Layout.from_proto(await _inspect())
    held = layout.weight_bytes + layout.kv_bytes
    memory = int(SLICE * (held + layout.reserve(held)))
    console.print(
        f"Three agents on this machine, each offering {memory / 1e6:.1f} MB. The demo model "
        f"takes {held / 1e6:.1f} MB with its cache.\n"
    )
    async with _agents(memory):
        options = ServeOptions(
            source=resolve("demo"), context=CONTEXT, nodes=list(MACHINES), host=HOST, port=0
        )
        async with served(options, cluster, console) as running:
            console.print()
            await chat(running.address, prompt)
    return 0


async def _inspect() -> ModelLayout:
    """The demo model's layout, found by a child: the coordinator never imports MLX."""
    child = await _start("-m", "node.layout", pipes=True)
    request = InspectRequest(model="demo", context=CONTEXT, users=1)
    out, err = await child.communicate(request.SerializeToString())
    if child.returncode != 0:
        lines = err.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UniclusterError(
            f"the demo model can't be inspected: {lines[-1]} "
            "(is MLX installed? pip install 'unicluster[cpu]')"
        )
    return ModelLayout.FromString(out)


@contextlib.asynccontextmanager
async def _agents(memory: int) -> AsyncIterator[None]:
    """Three agents while the block runs; each says so when it has joined."""
    agents = [
        await _start(
            *("-m", "unicluster", "join", "--name", name, "--memory", str(memory)),
            *("--host", HOST, "--port", "0", "--quiet"),
        )
        for name in MACHINES
    ]
    try:
        for name, agent in zip(MACHINES, agents, strict=True):
            if agent.stdout is not None and not await agent.stdout.readline():
                raise UnavailableError(f"the agent {name} did not start; its message is above")
        yield
    finally:
        for agent in agents:
            if agent.returncode is None:
                agent.terminate()
        for agent in agents:
            try:
                await asyncio.wait_for(agent.wait(), STOP_SECONDS)
            except TimeoutError:
                agent.kill()
                await agent.wait()


async def _start(*arguments: str, pipes: bool = False) -> asyncio.subprocess.Process:
    """A child of this Python; its errors are shown, unless `pipes` asks for them."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=pipe if pipes else asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe if pipes else None,
        start_new_session=True,  # Ctrl-C in the chat is not for the agents
    )
