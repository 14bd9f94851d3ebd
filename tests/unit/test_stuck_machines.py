"""Machines that answer pings and nothing else: what the coordinator waits for, and how long.

The machine is an agent with a head in this process, behind real gRPC, that freezes at a point.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from coordinator.models.catalog import Source
from coordinator.planning.links import Network
from coordinator.planning.placement import Plan
from coordinator.planning.stages import Span, stages
from coordinator.serving import lease
from coordinator.serving.deployment import Deployment, Files
from coordinator.serving.events import Events
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.cluster.channels import bind, make_server
from unicluster.deadlines import VARIABLE
from unicluster.errors import StageError, UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.v1.chat_pb2 import GenerateRequest, Measured
from unicluster.v1.chat_pb2_grpc import (
    ChatServicer,
    HeadServicer,
    add_ChatServicer_to_server,
    add_HeadServicer_to_server,
)
from unicluster.v1.meters_pb2 import Meters
from unicluster.v1.node_pb2 import (
    LoadProgress,
    NodeInfo,
    StageEvent,
    StageExit,
    StageReady,
    StageSpec,
)
from unicluster.v1.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from unicluster.v1.stage_pb2 import Opened, StageInfo

HOST = "127.0.0.1"
IDENTITY = Cluster.new().issue("ann")
WHO = r"machine ann \(layers 0 to 9\)"
# Seconds that any work may take here.
FLOOR = 0.2 * scaled(1)
LAYER = 100_000


class FakeMachine(NodeServicer, HeadServicer, ChatServicer):
    """An agent, and the head worker that it has started; `freezes` at a point.

    moving: its counters of computed tokens grow with each question.
    """

    def __init__(self, freezes: str, *, moving: bool = False) -> None:
        self.freezes = freezes
        self.moving = moving
        self.port = 0
        self.described = 0
        self.exit: StageExit | None = None
        self._specs: list[StageSpec] = []
        self._ended = asyncio.Event()
        self._tokens = 0

    async def RunStage(self, request: StageSpec, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self._specs.append(request)
        try:
            await self._reach("start")
            if self.exit is not None:
                await context.write(StageEvent(exit=self.exit))
                return
            await context.write(StageEvent(progress=LoadProgress(fetched=1, to_fetch=10_000)))
            await self._reach("fetch")
            half = LoadProgress(layers_done=5, layers_total=10, bytes_done=500, bytes_total=1000)
            await context.write(StageEvent(progress=half))
            await self._reach("load")
            await context.write(StageEvent(ready=StageReady(port=self.port)))
            await asyncio.Future()
        finally:
            if self.freezes != "unload":
                self._specs.clear()
                self._ended.set()

    async def Describe(self, request: Any, context: Any) -> NodeInfo:  # type: ignore[override]  # noqa: N802
        self.described += 1
        await self._reach("describe")
        if request.unless_deployment:
            await self._ended.wait()
        return NodeInfo(name="ann", stages=self._specs)

    async def HoldRing(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._reach("open")
        await context.write(Opened(stages=[StageInfo(node="ann", end_layer=10)]))
        await asyncio.Future()

    async def Measure(self, request: Any, context: Any) -> Measured:  # noqa: N802
        await self._reach("measure")
        self._tokens += self.moving
        return Measured(meters=Meters(now_s=time.monotonic(), prompt_tokens=self._tokens))

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await asyncio.Future()

    async def _reach(self, point: str) -> None:
        if self.freezes == point:
            await asyncio.Future()


@asynccontextmanager
async def deployed(machine: FakeMachine) -> AsyncIterator[Deployment]:
    """A deployment on one machine, not yet run."""
    server = make_server()
    add_NodeServicer_to_server(machine, server)
    add_HeadServicer_to_server(machine, server)
    add_ChatServicer_to_server(machine, server)
    machine.port = bind(server, HOST, 0, IDENTITY)
    await server.start()
    layout = a_layout([LAYER] * 10)
    where = replace(a_machine("ann", GB, 100e9), address=f"{HOST}:{machine.port}")
    plan = Plan("latency", 1, stages(Network(), [Span(where, 0, 10, layout)]), (), chunk_tokens=16)
    files = Files({"mlx": Source("it", "it", "")}, {"mlx": ""}, [], [[]])
    try:
        yield Deployment("it", layout, plan, IDENTITY, Events(), files, StageSpec())
    finally:
        await server.stop(grace=None)


@pytest.fixture(autouse=True)
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(FLOOR))
    monkeypatch.setattr(lease, "UNLOAD_SECONDS", 1.0)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("start", rf"{WHO} has loaded nothing for \d+ s"),
        ("fetch", rf"{WHO} has fetched nothing for \d+ s"),
        ("load", rf"{WHO} has loaded nothing for \d+ s"),
        ("open", rf"{WHO} did not open the ring within \d+ s"),
        ("measure", rf"{WHO} has answered no call for \d+ s"),
    ],
)
async def test_a_machine_that_freezes_is_named_with_its_work(
    point: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicluster.deadlines.OPEN_SECONDS", 0.5)
    async with deployed(FakeMachine(point)) as deployment, asyncio.timeout(scaled(30)):
        with pytest.raises(StageError) as error:
            await deployment.run()

        assert re.fullmatch(reason, str(error.value))
        assert deployment.detail == str(error.value)


async def an_answer(deployment: Deployment, running: asyncio.Task[None]) -> str:
    """An answer is asked for, as the gateway does; the reason for which it ended."""
    await deployment.until_ready()
    assert deployment.chat is not None
    call = deployment.chat.Generate(GenerateRequest())
    with deployment.answering(), deployment.watch.answer():
        await asyncio.wait([asyncio.ensure_future(call.read()), running], timeout=scaled(30))
    call.cancel()
    return deployment.ending


async def test_a_head_whose_answers_do_not_move_is_named() -> None:
    async with deployed(FakeMachine("")) as deployment:
        running = asyncio.create_task(deployment.run())

        reason = await an_answer(deployment, running)

        assert re.fullmatch(rf"{WHO} has computed nothing for \d+ s: 1 answers", reason)
        with pytest.raises(StageError, match=WHO):
            await running


async def test_a_head_that_computes_is_left_alone_however_long_it_takes() -> None:
    async with deployed(FakeMachine("", moving=True)) as deployment:
        running = asyncio.create_task(deployment.run())
        await deployment.until_ready()

        with deployment.watch.answer():
            await asyncio.wait([running], timeout=12 * FLOOR)

        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_an_unloading_machine_is_asked_once() -> None:
    machine = FakeMachine("")
    async with deployed(machine) as deployment:
        running = asyncio.create_task(deployment.run())
        await deployment.until_ready()

        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        assert machine.described == 1


@pytest.mark.parametrize("point", ["unload", "describe"])
async def test_a_machine_that_does_not_unload_is_named_and_not_waited_for(
    point: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with deployed(FakeMachine(point)) as deployment:
        running = asyncio.create_task(deployment.run())
        await deployment.until_ready()

        running.cancel()
        async with asyncio.timeout(scaled(20)):
            with contextlib.suppress(asyncio.CancelledError):
                await running

        assert re.search(rf"{WHO} has not unloaded its stage within 1 s", caplog.text)


async def test_the_last_lines_of_a_worker_and_a_long_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    machine = FakeMachine("")
    machine.exit = StageExit(reason="bad\x1b[2J " + "x" * 9000, stderr_tail=["no such\x07 kernel"])
    async with deployed(machine) as deployment:
        with pytest.raises(StageError) as error:
            await deployment.run()

    assert str(error.value).startswith("machine ann: bad\\x1b[2J xxx")
    assert len(str(error.value)) < 600
    assert "machine ann: its last lines: no such\\x07 kernel" in caplog.text


async def test_a_move_waits_for_an_answer_that_cant_go_on_elsewhere_but_not_for_ever() -> None:
    async with deployed(FakeMachine("start")) as deployment:
        with deployment.answering(lambda: True):
            await deployment.until_movable(0.01, 0.02)
        with (
            deployment.answering(lambda: False),
            deployment.answering(lambda: True),
            pytest.raises(UnavailableError, match="an answer that can't go on elsewhere still ran"),
        ):
            await deployment.until_movable(0.01, 0.02)
        await deployment.until_movable(60, 60)  # none runs


async def test_whoever_waits_hears_how_far_loading_is() -> None:
    async with deployed(FakeMachine("load")) as deployment:
        assert deployment.progress == ""
        running = asyncio.create_task(deployment.run())
        half = "loaded 500 B of 1.0 kB, 50 %"
        await asyncio.to_thread(until, lambda: deployment.progress == half, half)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
