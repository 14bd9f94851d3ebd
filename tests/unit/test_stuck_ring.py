"""A ring whose other side answers pings and does nothing: every wait ends, with a typed error.

The other side is a stage in this process, behind real gRPC, that freezes at a point.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import mlx.core as mx
import mlx.nn as nn
import pytest

from node.pipeline.pipeline_model import PipelineModel
from node.ring.compute_thread import MLXThread
from node.ring.ring import Reply, Ring
from node.ring.stage_service import StageService
from tests.support.deadlines import scaled
from unicluster import deadlines, failpoints
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.cluster.sizes import FRAME_BYTES
from unicluster.deadlines import VARIABLE, open_seconds
from unicluster.errors import StageError, UnavailableError, UniclusterError
from unicluster.trust.cluster import Cluster
from unicluster.v1.stage_pb2 import (
    ClockReading,
    Frame,
    HopMessage,
    Open,
    Opened,
    RouteStop,
    StageInfo,
)
from unicluster.v1.stage_pb2_grpc import (
    StageServicer,
    StageStub,
    add_StageServicer_to_server,
)
from unicluster.v1.tensor_pb2 import Leaf, Tensor

HOST = "127.0.0.1"
IDENTITY = Cluster.new().issue("ann")
# Seconds that any work may take here.
FLOOR = 0.5


class FakeStage(StageServicer):
    """The only remote stage of a ring. Frames come back after `pace` seconds each.

    freezes: at the opening ("open"), at frame number `at` ("frame"), or there and at questions
    about what it does ("all"). busy: seconds for which it says that it has been at its work.
    """

    def __init__(self, freezes: str = "", at: int = 0, pace: float = 0.0, busy: float = 0.0):
        self.freezes, self.at, self.pace, self.busy = freezes, at, pace, busy
        self.frozen = asyncio.Event()
        self.received: list[HopMessage] = []
        self.came = asyncio.Event()
        self._back: asyncio.Queue[Any] = asyncio.Queue()

    async def Hop(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        opening: Open = (await context.read()).open
        if self.freezes == "open":
            self.frozen.set()
            await asyncio.Future()
        info = StageInfo(node="bob", first_layer=10, end_layer=20)
        await context.write(HopMessage(opened=Opened(stages=[info])))
        while opening.returns:
            await context.write(await self._back.get())
        while isinstance(message := await context.read(), HopMessage):
            self.received.append(message)
            self.came.set()
            if message.frame.id == self.at:
                self.frozen.set()
                await asyncio.Future()
            await asyncio.sleep(self.pace)
            message.frame.reports.add(stage=1)
            self._back.put_nowait(message)

    async def Clock(self, request: Any, context: Any) -> ClockReading:  # noqa: N802
        if self.freezes == "all" and self.frozen.is_set():
            await asyncio.Future()
        return ClockReading(now_s=time.perf_counter(), running_s=self.busy, work="decode")


@asynccontextmanager
async def served(stage: StageServicer) -> AsyncIterator[list[RouteStop]]:
    server = make_server(most_bytes=FRAME_BYTES)
    add_StageServicer_to_server(stage, server)
    port = bind(server, HOST, 0, IDENTITY)
    await server.start()
    try:
        yield [RouteStop(node="bob", address=f"{HOST}:{port}")]
    finally:
        await server.stop(grace=None)


@pytest.fixture(autouse=True)
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(FLOOR))
    monkeypatch.setattr(deadlines, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(deadlines, "OPEN_SECONDS_A_STAGE", 0.5)


def frame(tokens: int) -> HopMessage:
    """A frame of prefill, or with one token of decode."""
    hidden = Leaf(tensor=Tensor(dtype="float32", shape=[1, tokens, 4], data=bytes(16 * tokens)))
    return HopMessage(frame=Frame(hidden=[hidden], hold=tokens > 1))


async def result(reply: Reply) -> Frame:
    async with asyncio.timeout(scaled(60)):
        return await asyncio.to_thread(reply.wait)


async def test_a_stage_that_does_not_open_is_named_in_time() -> None:
    async with served(FakeStage("open")) as route:
        began = time.monotonic()

        with pytest.raises(UnavailableError, match=r"^machine bob \(.*\) did not open the ring"):
            await Ring.open(route, IDENTITY)

        assert time.monotonic() - began < open_seconds(1) + scaled(5)


@pytest.mark.parametrize(
    ("at", "tokens", "work"),
    [
        pytest.param(1, 64, "prefill of 64 tokens", id="the first chunk"),
        pytest.param(5, 1, "decode", id="a later step"),
        pytest.param(5, 64, "prefill of 64 tokens", id="a later chunk", marks=pytest.mark.sweep),
        pytest.param(1, 1, "decode", id="the first step", marks=pytest.mark.sweep),
    ],
)
async def test_a_stage_that_computes_nothing_is_named_with_its_work(
    at: int, tokens: int, work: str
) -> None:
    failures: list[UniclusterError] = []
    async with served(FakeStage("frame", at)) as route:
        ring = await Ring.open(route, IDENTITY, failures.append)
        for _ in range(at - 1):
            await result(ring.send(frame(tokens)))

        with pytest.raises(StageError) as error:
            await result(ring.send(frame(tokens)))

        assert re.match(
            rf"machine bob \(layers 10 to 19\) has computed nothing for \d+ s: {work}",
            str(error.value),
        )
        assert failures == [error.value]
        with pytest.raises(StageError):  # and from now on at once
            await result(ring.send(frame(tokens)))
        await ring.close()


@pytest.mark.parametrize(
    ("freezes", "busy", "detail"),
    [
        ("all", 0.0, "decode; it answers nothing"),
        ("frame", 99.0, "decode"),
        ("frame", 0.0, "decode; a frame was lost between them"),
    ],
)
async def test_the_reason_says_what_is_known(freezes: str, busy: float, detail: str) -> None:
    async with served(FakeStage(freezes, 2, busy=busy)) as route:
        ring = await Ring.open(route, IDENTITY)
        await result(ring.send(frame(1)))

        with pytest.raises(StageError) as error:
            await result(ring.send(frame(1)))

        assert str(error.value).endswith(f" s: {detail}")
        await ring.close()


async def test_a_slow_stage_is_not_a_dead_one() -> None:
    """Many frames are on their way, which together take far longer than one may."""
    async with served(FakeStage(pace=FLOOR / 4)) as route:
        ring = await Ring.open(route, IDENTITY)

        replies = [ring.send(frame(1)) for _ in range(20)]

        for reply in replies:
            await result(reply)
        assert ring.failure is None
        await ring.close()


async def test_a_ring_that_has_nothing_to_do_lasts() -> None:
    async with served(FakeStage()) as route:
        ring = await Ring.open(route, IDENTITY)
        await result(ring.send(frame(1)))

        await asyncio.sleep(3 * FLOOR)  # time itself is what this test is about

        await result(ring.send(frame(1)))
        await ring.close()


async def test_a_frame_that_makes_no_sense_ends_the_ring_and_its_own_wait() -> None:
    """The head checks a frame on the event loop, and whoever waits for it is on another thread."""

    def refuses(frame: Frame) -> None:
        raise ValueError("two reports of one stage")

    async with served(FakeStage()) as route:
        ring = await Ring.open(route, IDENTITY)

        invalid = r"^machine bob .* sent an invalid frame: ValueError: two reports of one stage"
        for reply in (ring.send(frame(1), on_reply=refuses), ring.send(frame(1))):
            with pytest.raises(StageError, match=invalid):
                await result(reply)

        await ring.close()


class Echo:
    """A stage that computes nothing, and at once."""

    def open(self, stage: int, last: bool) -> Any:
        return SimpleNamespace(
            stage=stage, last=last, cancelled=set(), due=False, skips=lambda frame: False
        )

    def serve(self, session: Any, frame: Frame, arrived: float) -> None:
        frame.reports.add(stage=session.stage)

    def end(self, session: Any) -> None:
        """Nothing is held."""


@pytest.mark.parametrize(
    "point",
    [
        *("stage.open", "stage.received", "stage.send", "stage.sent"),
        *("stage.return", "stage.returned", "head.send", "head.sent", "head.returned"),
    ],
)
async def test_an_error_that_nobody_foresaw_ends_the_ring_and_names_a_machine(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = MLXThread()
    infos = [StageInfo(node=name, first_layer=1, end_layer=2) for name in ("bob", "cat")]
    echo: Any = Echo()
    first, second = (StageService(echo, info, thread, IDENTITY) for info in infos)
    monkeypatch.setattr(failpoints, "_points", failpoints.parse(f"{point}=error(odd)@1"))

    async def frames_until_one_fails(route: list[RouteStop]) -> None:
        ring = await Ring.open(route, IDENTITY)
        try:
            for _ in range(3):  # what goes wrong behind a frame ends the next one
                await result(ring.send(frame(1)))
        finally:
            await ring.close()

    async with served(first) as there, served(second) as behind:
        with pytest.raises(StageError, match=r"^machine bob .*FailpointError.*odd"):
            await frames_until_one_fails([*there, *behind])


async def test_a_head_that_opens_a_stream_and_says_nothing_is_hung_up_on() -> None:
    service: Any = StageService(Any, StageInfo(), MLXThread(), IDENTITY)  # type: ignore[arg-type]
    async with served(service) as route, connect(route[0].address, IDENTITY) as channel:
        hop: Any = StageStub(channel).Hop()  # type: ignore[call-arg]

        with pytest.raises(grpc.aio.AioRpcError, match="open: did not come in time"):
            async with asyncio.timeout(scaled(30)):
                await hop.read()


class FakeFront:
    """Stage 0 of a model whose hidden states are zeros."""

    model = nn.Module()
    hidden_bytes = 16
    vocabulary = 0

    class CacheView:
        def __len__(self) -> int:
            return 0

        def make(self) -> list[Any]:
            return []

    cache_view = CacheView()

    def front(self, inputs: mx.array, caches: list[Any]) -> tuple[mx.array, list[Any]]:
        return mx.zeros((*inputs.shape, 4)), []

    def final_logits(self, inputs: mx.array, received: Any, caches: list[Any]) -> mx.array:
        return mx.zeros((*inputs.shape, 8))


async def test_a_result_that_nobody_will_claim_is_freed_though_no_step_follows() -> None:
    stage = FakeStage()
    async with served(stage) as route:
        ring = await Ring.open(route, IDENTITY)
        model: Any = PipelineModel(FakeFront(), ring)

        model(mx.zeros((1, 64), mx.int32))  # its logits are held by the last stage, for nobody

        async with asyncio.timeout(scaled(30)):
            while not any(1 in message.frame.dropped for message in stage.received):
                await stage.came.wait()
                stage.came.clear()
        await ring.close()
