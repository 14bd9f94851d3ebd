"""Each cause of a loss, from a fault at the outermost edge to every word that people read of it.

One cluster serves all tests. The answer that each of them disturbs goes on.
"""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.support.brokers import COORDINATOR, Ear, Mosquitto, listening
from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from tests.support.logind import DAEMON, Logind, logind
from tests.support.memory_limit import can_limit_memory, memory_limit
from unicluster import failpoints
from unicluster.client.answers import Delta, Status
from unicluster.deadlines import VARIABLE
from unicluster.trust.store import Store
from unicluster.v1 import chat_pb2 as wire

MACHINES = ("ann", "bob", "cat")
# Two hold the model.
MEMORY = 9_000_000
CONTEXT = 4096
# Of silence until a worker counts as frozen.
FLOOR = 2.0
GOES_ON_WITHIN = 120.0
BROKER = shutil.which("mosquitto_passwd") is not None

pytestmark = pytest.mark.sweep  # each of them lasts as long as noticing a loss and loading


class Served:
    """The cluster, what serves its model, and all that can go wrong with it."""

    def __init__(
        self, cluster: LocalCluster, server: ServeProgram, manager: Logind | None, ear: Ear | None
    ) -> None:
        self.cluster = cluster
        self.server = server
        self.logind = manager
        self.ear = ear

    @property
    def stage(self) -> AgentProgram:
        """A machine that holds layers and is not the head."""
        until(lambda: self.server.describe().state == "ready", "the model is served")
        return self.cluster.agents[self.server.describe().stages[-1].node]

    def failpoints(self, text: str) -> None:
        """For all workers, until they are others."""
        file = self.cluster.folder / "failpoints"
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)

    def events(self) -> list[Any]:
        return [json.loads(line) for line in self.cluster.run("events", "--json").out.splitlines()]

    async def losses(self, cause: str) -> int:
        """As metrics count them."""
        async with self.server.async_client() as client, client._stub() as stub:
            return (await stub.Measure(wire.MeasureRequest())).losses[cause]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("causes")
    armed = f"@{folder / 'cluster' / 'failpoints'}"
    env = {VARIABLE: str(scaled(FLOOR)), failpoints.VARIABLE: armed}
    model = endless_model(folder / "llama")
    Store(folder / "cluster" / "home").create()
    with contextlib.ExitStack() as stack:
        manager = None
        if DAEMON is not None:
            (folder / "bus").mkdir()
            bus, manager = stack.enter_context(logind(folder / "bus"))
            env |= bus.environment
        cluster = stack.enter_context(LocalCluster(folder / "cluster", **env))
        ear = None
        if BROKER:
            broker = Mosquitto(folder / "mosquitto", cluster.cluster, MACHINES)
            stack.enter_context(broker)
            cluster.env["UNICLUSTER_MQTT"] = broker.url(COORDINATOR)
            ear = stack.enter_context(listening(broker.port, cluster.cluster))
        for name in MACHINES:
            cluster.start_agent(name, memory=MEMORY, UNICLUSTER_MQTT="")
        cluster.wait_for_agents()
        options = ("--context", str(CONTEXT), "--users", "2")
        server = stack.enter_context(cluster.serve(model, *options))
        yield Served(cluster, server, manager, ear)


async def statuses_of(served: Served, strike: Callable[[], object]) -> list[Status]:
    """Strikes in the middle of an answer, and returns what its client hears of that."""
    heard: list[Status] = []
    struck = False

    def hear(status: Status) -> None:
        heard.append(status)
        served.failpoints("")  # a fault strikes once, and not the worker that comes next

    async with asyncio.timeout(scaled(GOES_ON_WITHIN)), served.server.async_client() as client:
        events = client.stream("hello", temperature=0, max_tokens=CONTEXT - 100, on_status=hear)
        async for event in events:
            if isinstance(event, Delta) and not struck:
                struck = True
                strike()
            if [status.state for status in heard] == ["recovering", "resumed"]:
                break
        await events.aclose()
    return heard


async def assert_named(served: Served, strike: Callable[[], object], cause: str) -> None:
    """The cause is the word in the stream, the log of events, metrics, and over MQTT."""
    before, logged = await served.losses(cause), len(served.events())

    heard = await statuses_of(served, strike)

    assert [status.state for status in heard] == ["recovering", "resumed"]
    assert heard[-1].cause == cause
    assert await served.losses(cause) > before
    causes = [e["cause"] for e in served.events()[logged:] if e["kind"] != "was asleep"]
    assert cause in causes
    assert set(causes) <= {cause, ""}
    if served.ear is not None:
        said = [p for topic, p in served.ear.all if topic.endswith("/state") and "cause" in p]
        assert cause in [payload["cause"] for payload in said]


async def test_killed(served: Served) -> None:
    await assert_named(served, served.stage.worker.kill, "killed")


@pytest.mark.skipif(not can_limit_memory(), reason="control groups of memory need root on Linux")
async def test_out_of_memory(served: Served) -> None:
    """The kernel ends a worker whose control group has no room."""
    worker = served.stage.worker
    with memory_limit(64 << 10) as limited:
        await assert_named(served, lambda: limited(worker.pid), "out of memory")


async def test_frozen(served: Served) -> None:
    """Computing stands still, as in a driver, and the worker answers all the same."""
    worker = served.stage.worker
    await assert_named(served, lambda: served.failpoints("stage.compute=delay(600000)"), "frozen")
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


async def test_driver_fault(served: Served) -> None:
    """As MLX raises it: a card that failed once is of no use to its process."""
    worker = served.stage.worker
    fault = "stage.compute=error(CUDA error: an illegal memory access was encountered)"
    await assert_named(served, lambda: served.failpoints(fault), "driver fault")
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


async def test_unreachable(served: Served) -> None:
    agent = served.stage
    machine = [agent.worker, psutil.Process(agent.pid)]

    def silence() -> None:
        for process in machine:
            process.suspend()

    try:
        await assert_named(served, silence, "unreachable")
    finally:
        for process in machine:
            process.resume()


@pytest.mark.skipif(DAEMON is None, reason="apt-get install dbus-daemon")
async def test_asleep(served: Served) -> None:
    """logind says so to the agents, which tell who serves from them."""
    manager = served.logind
    assert manager is not None
    until(lambda: len(manager.held("sleep", "delay")) == len(MACHINES), "sleep waits for all")
    until(lambda: manager.held("idle", "block"), "machines with layers stay awake")

    # All agents follow one logind: the model has no machine until they are awake.
    def sleep_and_wake() -> None:
        manager.announce(True)
        until(lambda: not manager.held("sleep", "delay"), "all machines may sleep")
        manager.announce(False)

    await assert_named(served, sleep_and_wake, "asleep")
    reasons = [event["text"] for event in served.events() if event["cause"] == "asleep"]
    assert all("goes to sleep" in reason for reason in reasons)
