"""One plan carried out: every stage loaded on its machine, the ring open, and kept so."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from coordinator.catalog import Source
from coordinator.placement import Layout, Plan, Stage
from unicluster.channels import as_error, connect
from unicluster.errors import StageError, UnavailableError, UniclusterError
from unicluster.trust import Identity
from unicluster.v1.chat_pb2 import HoldRingRequest
from unicluster.v1.chat_pb2_grpc import ChatStub, HeadStub
from unicluster.v1.node_pb2 import LoadProgress, StageEvent, StageExit, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.stage_pb2 import Opened, RouteStop, StageInfo

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.2


@dataclass
class Listener:
    """Who wants to know how loading goes. All are called on the event loop."""

    progress: Callable[[str, LoadProgress], None] = lambda name, progress: None
    ready: Callable[[str], None] = lambda name: None
    failed: Callable[[str, str], None] = lambda name, reason: None


class _Lease:
    """One stage on one machine: the stream that keeps it there."""

    def __init__(self, stage: Stage, spec: StageSpec, channel: grpc.aio.Channel) -> None:
        self.stage = stage
        self.address: str | None = None
        self.lost: UniclusterError | None = None
        self._spec = spec
        self._channel = channel

    @property
    def name(self) -> str:
        return self.stage.machine.name

    async def hold(self, listener: Listener, changed: Callable[[], None]) -> None:
        """Follows the stage until it is lost."""
        try:
            async for event in NodeStub(self._channel).RunStage(self._spec):
                self._note(event, listener)
                changed()
            self.lost = self.lost or UnavailableError(f"machine {self.name} ended its stage")
        except grpc.aio.AioRpcError as error:
            self.lost = as_error(error, f"machine {self.name} ({self.stage.machine.address})")
        self.address = None
        listener.failed(self.name, str(self.lost))
        changed()

    def _note(self, event: StageEvent, listener: Listener) -> None:
        if event.HasField("progress"):
            listener.progress(self.name, event.progress)
        elif event.HasField("ready"):
            host = self.stage.machine.address.rpartition(":")[0]
            self.address = f"{host}:{event.ready.port}"
            listener.ready(self.name)
        else:
            self._ended(event.exit)

    def _ended(self, ended: StageExit) -> None:
        self.address = None
        log.warning("machine %s: worker ended: %s", self.name, ended.reason)
        if not ended.restarting:
            memory = ", out of memory" if ended.out_of_memory else ""
            self.lost = StageError(f"machine {self.name}{memory}: {ended.reason}")


class Deployment:
    """Stages as planned, from loading to unloading.

    `state` is loading, ready or recovering, `detail` why in a sentence.
    """

    def __init__(
        self, source: Source, layout: Layout, plan: Plan, identity: Identity, listener: Listener
    ) -> None:
        self.plan = plan
        self.state = "loading"
        self.detail = f"loading {source.display}"
        self.stages: list[StageInfo] = []
        self.chat: ChatAsyncStub | None = None
        self._identity = identity
        self._listener = listener
        self._changed = asyncio.Event()
        self._channels = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._was_ready = asyncio.Event()
        deployment = secrets.token_hex(8)
        self._specs = [
            StageSpec(
                deployment=deployment,
                model=source.model,
                quant=source.quant,
                first_layer=stage.first,
                end_layer=stage.end,
                context=layout.context,
                users=layout.users,
                memory=stage.weight_bytes + stage.kv_bytes + stage.reserve_bytes,
            )
            for stage in plan.stages
        ]
        self._leases: list[_Lease] = []

    @property
    def head_name(self) -> str:
        return self.plan.stages[0].machine.name

    async def run(self) -> None:
        """Loads, then serves, until a machine is lost: raises the error that names it."""
        async with self._channels:
            try:
                await self._supervise()
            finally:
                self.chat = None
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until_ready(self) -> None:
        """Returns when the model answers for the first time."""
        await self._was_ready.wait()

    async def _supervise(self) -> None:
        for stage, spec in zip(self.plan.stages, self._specs, strict=True):
            channel = await self._connect(stage.machine.address)
            lease = _Lease(stage, spec, channel)
            self._leases.append(lease)
            hold = lease.hold(self._listener, self._changed.set)
            self._tasks.append(asyncio.create_task(hold))
        while True:
            addresses = await self._all_ready()
            await self._hold_ring(addresses)
            self.chat = None
            await asyncio.sleep(RETRY_SECONDS)

    async def _all_ready(self) -> list[str]:
        while True:
            self._changed.clear()
            for lease in self._leases:
                if lease.lost is not None:
                    raise lease.lost
            addresses = [lease.address for lease in self._leases if lease.address is not None]
            if len(addresses) == len(self._leases):
                return addresses
            await self._changed.wait()

    async def _hold_ring(self, addresses: list[str]) -> None:
        route = [
            RouteStop(node=lease.name, address=address)
            for lease, address in zip(self._leases[1:], addresses[1:], strict=True)
        ]
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(connect(addresses[0], self._identity))
            ring = HeadStub(channel).HoldRing(HoldRingRequest(route=route))
            try:
                async for opened in ring:
                    self._open(opened, ChatStub(channel))
                reason = f"machine {self.head_name} closed the ring"
            except grpc.aio.AioRpcError as error:
                reason = str(as_error(error, f"machine {self.head_name} (head)"))
            self.state, self.detail = "recovering", reason
            log.warning("%s", reason)

    def _open(self, opened: Opened, chat: "ChatAsyncStub") -> None:
        self.stages = list(opened.stages)
        self.chat = chat
        self.state, self.detail = "ready", ""
        self._was_ready.set()

    async def _connect(self, address: str) -> grpc.aio.Channel:
        return await self._channels.enter_async_context(connect(address, self._identity))
