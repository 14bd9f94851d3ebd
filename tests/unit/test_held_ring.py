"""A ring that its coordinator has left: taken over by the next one, or closed.

The other stage is in this process, behind real gRPC, and so is the head.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from node.worker.head import Head
from tests.support.deadlines import scaled
from tests.support.engines import until
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.cluster.sizes import FRAME_BYTES
from unicluster.errors import UniclusterError
from unicluster.trust.cluster import Cluster
from unicluster.v1.chat_pb2 import HoldRingRequest
from unicluster.v1.chat_pb2_grpc import HeadStub, add_HeadServicer_to_server
from unicluster.v1.stage_pb2 import (
    ClockReading,
    HopMessage,
    Opened,
    RouteStop,
    StageInfo,
)
from unicluster.v1.stage_pb2_grpc import StageServicer, add_StageServicer_to_server

HOST = "127.0.0.1"
IDENTITY = Cluster.new().issue("ann")
FOR_EVER = 3600.0


class Stage(StageServicer):
    """The only remote stage. sessions: of heads that are connected now; opened: ever."""

    def __init__(self) -> None:
        self.sessions: set[str] = set()
        self.opened: list[str] = []
        self.breaks = asyncio.Event()

    async def Hop(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        opening = (await context.read()).open
        info = StageInfo(node="bob", first_layer=10, end_layer=20)
        if not opening.returns:
            self.sessions.add(opening.session)
            self.opened.append(opening.session)
        try:
            await context.write(HopMessage(opened=Opened(stages=[info])))
            await self.breaks.wait()
        finally:
            self.sessions.discard(opening.session)

    async def Clock(self, request: Any, context: Any) -> ClockReading:  # noqa: N802
        return ClockReading()


class Engine:
    """Stands for the generation engine: notes what the head does with it."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.settled = 0
        self.failures: list[UniclusterError] = []
        self.on_failure: Any = None
        self.while_settling: Callable[[], None] = lambda: None

    async def set_model(self, model: Any) -> None:
        self.models.append(model)

    async def settle(self) -> None:
        self.settled += 1
        self.while_settling()

    def fail(self, error: UniclusterError) -> None:
        self.failures.append(error)


class Machines:
    """A head and the stages behind it."""

    def __init__(self, head: Head, engine: Engine, stub: Any, ports: dict[int, Stage]) -> None:
        self.head, self.engine, self.stub, self.ports = head, engine, stub, ports

    @property
    def stage(self) -> Stage:
        return next(iter(self.ports.values()))

    def route(self, which: int = 0, **more: Any) -> list[RouteStop]:
        port = list(self.ports)[which]
        return [RouteStop(**({"node": "bob", "address": f"{HOST}:{port}"} | more))]

    async def hold(self, route: list[RouteStop]) -> Any:
        """The call of a coordinator that holds the ring, once it is open."""
        call = self.stub.HoldRing(HoldRingRequest(route=route))
        async with asyncio.timeout(scaled(60)):
            opened = await call.read()
        assert len(opened.stages) == 2
        return call


Start = Callable[[float], Awaitable[Machines]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a head with a grace, and two stages."""
    ends = []

    async def begin(grace_s: float) -> Machines:
        ports = {}
        for _ in range(2):
            stage, server = Stage(), make_server(most_bytes=FRAME_BYTES)
            add_StageServicer_to_server(stage, server)
            ports[bind(server, HOST, 0, IDENTITY)] = stage
            await server.start()
            ends.append(server.stop)
        engine, front = Engine(), SimpleNamespace(model=None)
        info = StageInfo(node="ann", end_layer=10)
        head = Head(front, info, engine, IDENTITY, grace_s=grace_s)  # type: ignore[arg-type]
        server = make_server()
        add_HeadServicer_to_server(head, server)
        port = bind(server, HOST, 0, IDENTITY)
        await server.start()
        ends.append(server.stop)
        channel = connect(f"{HOST}:{port}", IDENTITY)
        return Machines(head, engine, HeadStub(channel), ports)

    yield begin
    for end in reversed(ends):
        await end(grace=None)


async def leave(call: Any) -> None:
    call.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call.read()


async def test_the_next_coordinator_takes_it_over_with_its_model(start: Start) -> None:
    machines = await start(FOR_EVER)
    await leave(await machines.hold(machines.route()))

    # At another address of the same machine.
    route = machines.route(addresses=["10.1.2.3:1", f"{HOST}:1"])
    await machines.hold(route)

    assert len(machines.stage.opened) == len(machines.engine.models) == 1
    assert machines.engine.settled == 1
    assert not machines.engine.failures
    assert machines.head.model is machines.engine.models[0]


@pytest.mark.parametrize("other", ["port", "name"])
async def test_another_route_closes_it_first(start: Start, other: str) -> None:
    machines = await start(FOR_EVER)
    first = await machines.hold(machines.route())
    (session,) = machines.stage.sessions
    await leave(first)

    route = machines.route(1) if other == "port" else machines.route(node="bo")
    await machines.hold(route)

    await until(lambda: session not in machines.stage.sessions)
    assert len(machines.engine.models) == 2
    assert not machines.engine.settled
    assert machines.engine.failures


async def test_nobody_takes_it_over_and_its_time_ends(start: Start) -> None:
    machines = await start(0.05)

    await leave(await machines.hold(machines.route()))

    await until(lambda: not machines.stage.sessions)
    await until(lambda: machines.engine.failures)
    assert machines.head.model is None


async def test_without_a_grace_it_ends_with_its_coordinator(start: Start) -> None:
    machines = await start(0.0)

    await leave(await machines.hold(machines.route()))

    await until(lambda: not machines.stage.sessions)
    await machines.hold(machines.route())
    assert len(machines.engine.models) == 2
    assert not machines.engine.settled


async def test_one_that_broke_meanwhile_is_opened_anew(start: Start) -> None:
    machines = await start(FOR_EVER)
    await leave(await machines.hold(machines.route()))
    machines.stage.breaks.set()
    await until(lambda: machines.head.model is None)  # at once, not with its grace
    machines.stage.breaks.clear()

    await machines.hold(machines.route())

    assert len(machines.stage.opened) == len(machines.engine.models) == 2


async def test_one_that_breaks_while_it_is_taken_over_is_opened_anew(start: Start) -> None:
    machines = await start(FOR_EVER)
    await leave(await machines.hold(machines.route()))
    machines.engine.while_settling = lambda: machines.head.fail(UniclusterError("stuck"))

    await machines.hold(machines.route())

    assert machines.engine.settled == 1
    assert len(machines.engine.models) == 2


async def test_coordinators_follow_one_another_any_number_of_times(start: Start) -> None:
    machines = await start(FOR_EVER)
    for _ in range(5):
        await leave(await machines.hold(machines.route()))

    await machines.hold(machines.route())

    assert len(machines.stage.opened) == 1
    assert machines.engine.settled == 5


async def test_its_failure_still_reaches_the_coordinator_that_took_it_over(start: Start) -> None:
    machines = await start(FOR_EVER)
    await leave(await machines.hold(machines.route()))
    call = await machines.hold(machines.route())

    machines.stage.breaks.set()

    with pytest.raises(grpc.aio.AioRpcError, match="bob"):
        await asyncio.wait_for(call.read(), scaled(60))
