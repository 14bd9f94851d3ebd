"""The head in the caller's own process: workers elsewhere, one open ring, one PipelineModel."""

import asyncio
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import uvloop
from mlx_lm.utils import load_tokenizer

from node.config import WorkerConfig
from node.hollow import HollowModel
from node.pipeline import PipelineModel
from node.process import WorkerProcess
from node.ring import Ring
from node.weights import LazyModel, load_lazy, load_parts, model_path
from node.worker import SWITCH_INTERVAL
from unicluster.channels import as_error, connect
from unicluster.errors import StageError, UnavailableError
from unicluster.trust import Cluster, Identity
from unicluster.v1.node_pb2 import StageEvent, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.stage_pb2 import RouteStop

T = TypeVar("T")

Cut = tuple[int, int]


class Background:
    """An event loop on a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="network", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


class LoadedModel(PipelineModel):
    """A pipeline model that also ends the workers it was loaded onto.

    `close` does so, and so does the end of the process.
    """

    def __init__(self, hollow: HollowModel, ring: Ring | None, closing: Any) -> None:
        super().__init__(hollow, ring)
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


def load_local(model: str, quant: str, cuts: list[Cut]) -> tuple[LoadedModel, Any]:
    """Stage 0 here, the others in worker processes on this machine.

    Raises StageError when a worker can't load, with its reason.
    """
    background = Background()
    identity = Cluster.new().issue("local")
    workers: list[WorkerProcess] = []
    if Path(model).exists():
        model = str(Path(model).absolute())

    async def start() -> list[RouteStop]:
        configs = [
            WorkerConfig(
                node=f"local-{index}",
                model=model,
                quant=quant,
                first_layer=first,
                end_layer=end,
                context=0,
                users=1,
                host="127.0.0.1",
                port=0,
                identity=identity.to_dict(),
            )
            for index, (first, end) in enumerate(cuts)
        ]
        for config in configs[1:]:
            workers.append(await WorkerProcess.start(config))
        return [await _ready(worker, c) for worker, c in zip(workers, configs[1:], strict=True)]

    async def stop() -> None:
        await asyncio.gather(*(worker.stop() for worker in workers))

    return _assemble(model, quant, cuts, identity, background, start, stop)


def load_on_nodes(
    model: str, quant: str, cuts: list[Cut], nodes: list[RouteStop], identity: Identity
) -> tuple[LoadedModel, Any]:
    """Stage 0 here, the others on the agents `nodes`, in that order.

    Raises UnavailableError or StageError naming the machine that can't take its stage.
    """
    background = Background()
    leases: list[Any] = []
    channels: list[grpc.aio.Channel] = []

    async def start() -> list[RouteStop]:
        for node, (first, end) in zip(nodes, cuts[1:], strict=True):
            channels.append(connect(node.address, identity))
            spec = StageSpec(
                deployment=f"load-{id(background):x}",
                model=model,
                quant=quant,
                first_layer=first,
                end_layer=end,
                users=1,
            )
            leases.append(NodeStub(channels[-1]).RunStage(spec))
        return [await _leased(lease, node) for lease, node in zip(leases, nodes, strict=True)]

    async def stop() -> None:
        for lease in leases:
            lease.cancel()
        for channel in channels:
            await channel.close(grace=None)

    return _assemble(model, quant, cuts, identity, background, start, stop)


def load_head(model: str, quant: str, end: int) -> tuple[LazyModel, HollowModel]:
    """Stage 0 with its weights in memory, layers [0, end) and all that is outside the layers."""
    lazy = load_lazy(model_path(model), quant)
    hollow = HollowModel(lazy.model, lazy.model_type, 0, end)
    for _ in load_parts((*hollow.layers, lazy.model)):
        pass
    return lazy, hollow


def _assemble(
    model: str,
    quant: str,
    cuts: list[Cut],
    identity: Identity,
    background: Background,
    start: Any,
    stop: Any,
) -> tuple[LoadedModel, Any]:
    sys.setswitchinterval(SWITCH_INTERVAL)
    ring: Ring | None = None

    def closing() -> None:
        if ring is not None:
            background.run(ring.close())
        background.run(stop())
        background.stop()

    try:
        lazy, hollow = load_head(model, quant, cuts[0][1])
        tokenizer = load_tokenizer(lazy.path, eos_token_ids=lazy.config.get("eos_token_id"))
        if len(cuts) > 1:
            ring = background.run(_open(start, identity))
    except BaseException:
        closing()
        raise
    return LoadedModel(hollow, ring, closing), tokenizer


async def _open(start: Any, identity: Identity) -> Ring:
    return await Ring.open(await start(), identity)


async def _ready(worker: WorkerProcess, config: WorkerConfig) -> RouteStop:
    async for event in worker.events():
        if event["event"] == "ready":
            return RouteStop(node=config.node, address=f"{config.host}:{event['port']}")
    ended = await worker.exit()
    raise StageError(f"{config.node}: {ended.reason}")


async def _leased(lease: Any, node: RouteStop) -> RouteStop:
    host = node.address.rpartition(":")[0]
    try:
        while isinstance(event := await lease.read(), StageEvent):
            if event.HasField("ready"):
                return RouteStop(node=node.node, address=f"{host}:{event.ready.port}")
            if event.HasField("exit") and not event.exit.restarting:
                raise StageError(f"machine {node.node}: {event.exit.reason}")
    except grpc.aio.AioRpcError as error:
        raise as_error(error, f"machine {node.node} ({node.address})") from error
    raise UnavailableError(f"machine {node.node} ({node.address}) ended the stage")
