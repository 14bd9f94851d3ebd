"""A cluster on this machine alone: model inspection and agents as children of this process."""

import asyncio
import contextlib
import importlib.util
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence

from coordinator.programs import INSPECT
from unicluster.checkpoints import inspecting
from unicluster.errors import UnavailableError
from unicluster.program import child_environment, module_command
from unicluster.trust.cluster import Cluster
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

HOME = "UNICLUSTER_HOME"
HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 10.0


@contextlib.contextmanager
def own_cluster() -> Iterator[Cluster]:
    """A cluster for as long as the block runs: nothing of the machine's real one is touched."""
    before = os.environ.get(HOME)
    with tempfile.TemporaryDirectory(prefix="unicluster-") as home:
        os.environ[HOME] = home
        try:
            yield Store().create()
        finally:
            del os.environ[HOME]
            if before is not None:
                os.environ[HOME] = before


async def inspect(request: InspectRequest) -> ModelLayout:
    """The layout of a model on this machine, from a child: the coordinator never imports MLX.

    Raises InputError with the child's reason, UnavailableError if it takes too long.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        reason = "MLX is not installed here: pip install 'unicluster[cpu]'"
        raise UnavailableError(f"the model {request.model} can't be inspected: {reason}")
    return await inspecting.inspect(INSPECT, request)


@contextlib.asynccontextmanager
async def agents(names: Sequence[str], memory: int) -> AsyncIterator[None]:
    """Agents that offer so many bytes each while the block runs; each says so when it has joined.

    They join the cluster of $UNICLUSTER_HOME.
    """
    started = [
        await start(
            *("unicluster", "join", "--name", name, "--memory", str(memory), "--no-spare"),
            *("--host", HOST, "--port", "0", "--quiet"),
        )
        for name in names
    ]
    try:
        for name, agent in zip(names, started, strict=True):
            if agent.stdout is None:
                continue
            try:
                async with asyncio.timeout(START_SECONDS):
                    joined = await agent.stdout.readline()
            except TimeoutError:
                reason = f"the agent {name} has not joined within {START_SECONDS:.0f} s"
                raise UnavailableError(reason) from None
            if not joined:
                raise UnavailableError(f"the agent {name} did not start; its message is above")
        yield
    finally:
        await end(started)


async def start(
    module: str, *arguments: str, pipes: bool = False, env: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    """A module run by this Python; its errors show, unless `pipes` asks for all of its streams.

    env: variables besides those of this process.
    """
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *module_command(module, *arguments),
        stdin=pipe if pipes else asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe if pipes else None,
        env=child_environment(env),
        start_new_session=True,  # Ctrl-C in a chat is not for the agents
    )


async def end(children: Sequence[asyncio.subprocess.Process]) -> None:
    """Tells them to end, and kills those that don't in time."""
    for child in children:
        if child.returncode is None:
            child.terminate()
    for child in children:
        try:
            await asyncio.wait_for(child.wait(), STOP_SECONDS)
        except TimeoutError:
            child.kill()
            await child.wait()
