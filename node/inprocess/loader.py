"""The head in the caller's own process: workers elsewhere, one open ring, one PipelineModel."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import grpc.aio
import uvloop

from node.inprocess.first_stage import FirstStage, stage_specs
from node.pipeline.pipeline_model import Front, PipelineModel
from node.ring.ring import Ring
from node.weights import store
from node.weights.fetch import describe
from node.weights.sources import Sources
from node.worker.__main__ import SWITCH_INTERVAL
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.weights_service import WeightsService
from unicluster.cluster.channels import (
    as_error,
    bind,
    join_address,
    lasting,
    make_server,
    split_address,
)
from unicluster.deadlines import LOAD, Work, WorkDeadlines, floor_seconds
from unicluster.errors import StageError, UnavailableError
from unicluster.stall import within
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import DescribeNodeRequest, StageEvent
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.stage_pb2 import RouteStop
from unicluster.v1.weights_pb2_grpc import add_WeightsServicer_to_server

T = TypeVar("T")

Cut = tuple[int, int]

# An agent watches its worker, and ends it, sooner than it is given up here.
PATIENCE_FLOORS = 2.0


class Background:
    """An event loop on a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="network", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the loop meanwhile."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


class LoadedModel(PipelineModel):
    """A pipeline model that also ends the workers it was loaded onto.

    `close` does so, and so does the end of the process.
    """

    def __init__(
        self, front: Front, ring: Ring | None, closing: Any, *, prebuilt: bool = True
    ) -> None:
        super().__init__(front, ring, prebuilt=prebuilt)
        self._closing = closing

    def close(self) -> None:
        """Frees the memory on all stages. The model is of no use afterwards."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()

    def __enter__(self) -> "LoadedModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def describe_here(model: str, identity: Credentials, sources: Sequence[str] = ()) -> Checkpoint:
    """Checkpoint of a model with its description, from a directory, cache, `sources` or the hub.

    Raises InputError, NotFoundError or UnavailableError.
    """

    async def work() -> Checkpoint:
        async with Sources(sources, identity) as others:
            return await describe(model, "", others)

    background = Background()
    try:
        return background.run(work())
    finally:
        background.stop()


def load_local(
    checkpoint: Checkpoint,
    quant: str,
    cuts: list[Cut],
    identity: Credentials,
    *,
    prebuilt: bool = True,
) -> tuple[LoadedModel, Any]:
    """Stage 0 here, the others in worker processes on this machine.

    `prebuilt`: decode steps are built before their input is there; off only to measure what it
    gains. Raises StageError when a worker can't load, with its reason.
    """
    background = Background()
    workers: list[WorkerProcess] = []
    head, *others = stage_specs(checkpoint, quant, cuts)
    configs = [
        WorkerConfig(
            spec=spec,
            node=f"local-{index}",
            host="127.0.0.1",
            port=0,
            identity=identity.current.to_dict(),
            alone=True,
            prebuilt=prebuilt,
        )
        for index, spec in enumerate(others, start=1)
    ]

    async def start() -> list[RouteStop]:
        for config in configs:
            workers.append(await WorkerProcess.start(config))
        return [await _ready(worker, c) for worker, c in zip(workers, configs, strict=True)]

    async def stop() -> None:
        await asyncio.gather(*(worker.stop() for worker in workers))

    first = FirstStage(checkpoint, head, prebuilt=prebuilt)
    starting = start if others else None
    return _assemble(first, identity, background, starting, stop)


def load_on_nodes(
    checkpoint: Checkpoint,
    quant: str,
    cuts: list[Cut],
    nodes: list[RouteStop],
    identity: Credentials,
    hub_files: list[list[str]],
) -> tuple[LoadedModel, Any]:
    """Stage 0 here, the others on the agents `nodes`, in that order.

    `hub_files`: files that each stage fetches from the hub; the other machines get the
    rest from this one. Raises UnavailableError or StageError naming the machine that can't take
    its stage.
    """
    background = Background()
    leases: list[Any] = []
    channels = contextlib.AsyncExitStack()
    servers: list[grpc.aio.Server] = []
    addresses = tuple(node.address for node in nodes)
    head, *others = stage_specs(checkpoint, quant, cuts)

    def offered(model: str, revision: str) -> Checkpoint | None:
        manifest = checkpoint.manifest
        if (model, revision) == (manifest.model, manifest.revision):
            return checkpoint
        return store.offered(model, revision)

    async def start() -> list[RouteStop]:
        server = make_server()
        add_WeightsServicer_to_server(WeightsService(offered), server)
        port = bind(server, "", 0, identity)
        await server.start()
        servers.append(server)
        for node, spec, files in zip(nodes, others, hub_files[1:], strict=True):
            channel = await channels.enter_async_context(
                lasting(node.address, identity, _describe, machine=node.machine)
            )
            spec.deployment = f"load-{id(background):x}"
            spec.sources.extend([f":{port}", *addresses])
            spec.hub_files.extend(files)
            leases.append(NodeStub(channel).RunStage(spec))
        size = sum(checkpoint.manifest.files[name].size for name in checkpoint.manifest.weights)
        return [await _leased(lease, node, size) for lease, node in zip(leases, nodes, strict=True)]

    async def stop() -> None:
        for lease in leases:
            lease.cancel()
        await channels.aclose()
        for server in servers:
            await server.stop(grace=None)

    first = FirstStage(checkpoint, head, hub_files[0], addresses)
    return _assemble(first, identity, background, start, stop)


def _assemble(
    stage: FirstStage,
    identity: Credentials,
    background: Background,
    start: Callable[[], Coroutine[Any, Any, list[RouteStop]]] | None,
    stop: Callable[[], Coroutine[Any, Any, None]],
) -> tuple[LoadedModel, Any]:
    sys.setswitchinterval(SWITCH_INTERVAL)
    ring: Ring | None = None

    def closing() -> None:
        if ring is not None:
            background.run(ring.close())
        background.run(stop())
        background.stop()

    try:
        stops = background.start(start()) if start is not None else None
        head, tokenizer = stage.load(identity, background.run)
        if stops is not None:
            ring = background.run(_open(stops, identity))
    except BaseException:
        closing()
        raise
    return LoadedModel(head.front, ring, closing, prebuilt=head.prebuilt), tokenizer


async def _describe(channel: grpc.aio.Channel) -> None:
    await NodeStub(channel).Describe(DescribeNodeRequest())


async def _open(stops: Future[list[RouteStop]], identity: Credentials) -> Ring:
    return await Ring.open(await asyncio.wrap_future(stops), identity)


async def _ready(worker: WorkerProcess, config: WorkerConfig) -> RouteStop:
    async for event in worker.events():
        if event["event"] == "ready":
            return RouteStop(node=config.node, address=f"{config.host}:{event['port']}")
    ended = await worker.exit()
    raise StageError(f"{config.node}: {ended.reason}")


async def _leased(lease: Any, node: RouteStop, size: int) -> RouteStop:
    """Where a stage is ready; its model's files have `size` bytes, and each event takes no longer
    than they may.
    """
    known = [split_address(address)[0] for address in (node.address, *node.addresses)]
    seconds = WorkDeadlines().limit(Work(LOAD, size)) + PATIENCE_FLOORS * floor_seconds()

    async def read() -> object:
        return await lease.read()

    try:
        while isinstance(event := await within(seconds, read()), StageEvent):
            if event.HasField("ready"):
                worker = [join_address(host, event.ready.port) for host in dict.fromkeys(known)]
                return RouteStop(
                    node=node.node,
                    address=worker[0],
                    addresses=worker,
                    machine=node.machine,
                )
            if event.HasField("exit") and not event.exit.restarting:
                raise StageError(f"machine {node.node}: {event.exit.reason}")
    except TimeoutError:
        reason = f"machine {node.node} ({node.address}) has loaded nothing for {seconds:.0f} s"
        raise StageError(reason) from None
    except grpc.aio.AioRpcError as error:
        raise as_error(error, f"machine {node.node} ({node.address})") from error
    raise UnavailableError(f"machine {node.node} ({node.address}) ended the stage")
