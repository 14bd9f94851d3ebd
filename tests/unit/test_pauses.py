"""Between a loss and the next plan: no wait there is long while an answer waits, or without end."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.fleet.members import Members
from coordinator.fleet.news import has_changed
from coordinator.planning.machine import Machine
from coordinator.recovery import lifecycle, pauses
from coordinator.recovery.pauses import Pauses
from coordinator.serving import service as serving
from coordinator.serving import sourcing
from coordinator.serving.deployment import Deployment
from coordinator.serving.service import Service
from coordinator.serving.sourcing import hub_files
from tests.support.deadlines import scaled
from unicluster.cluster.records import ServiceRecord
from unicluster.errors import DoesNotFitError, UnavailableError
from unicluster.failpoints import FailpointError
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import WeightFile

HOUR = 3600.0
BOB = ServiceRecord("bob", "f", ("10.0.0.2:7001",), usable=1000)


class Change:
    """Machines that change when a test says so, or not within the seconds."""

    def __init__(self) -> None:
        self.now = asyncio.Event()
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> bool:
        self.asked.append(seconds)
        try:
            async with asyncio.timeout(seconds):
                await self.now.wait()
        except TimeoutError:
            return False
        return True


async def soon(work: Awaitable[None]) -> None:
    async with asyncio.timeout(scaled(60)):
        await work


async def test_a_long_pause_is_short_once_an_answer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "WAITED_SECONDS", 0.05)
    between = Pauses(Change())
    pausing = asyncio.create_task(between.pause(HOUR))
    await asyncio.wait([pausing], timeout=0.1)
    assert not pausing.done()

    with between.waited_for():
        await soon(pausing)
        await soon(between.pause(HOUR))

    assert not between.was_cut
    pausing = asyncio.create_task(between.pause(HOUR))
    await asyncio.wait([pausing], timeout=0.1)
    assert not pausing.done()  # nobody waits any more
    pausing.cancel()
    await asyncio.gather(pausing, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_machines_that_change_cut_a_pause_and_time_does_not() -> None:
    change = Change()
    between = Pauses(change)
    await soon(between.pause(0.01))
    assert not between.was_cut

    pausing = asyncio.create_task(between.pause(HOUR))
    await asyncio.sleep(0)
    change.now.set()
    await soon(pausing)

    assert between.was_cut
    assert change.asked == [0.01, HOUR]


@pytest.mark.parametrize(
    ("now", "news"),
    [
        ([BOB], False),
        ([replace(BOB, chip="M9", usable=1050)], False),
        ([replace(BOB, usable=500)], False),
        ([], True),
        ([BOB, replace(BOB, name="cat")], True),
        ([replace(BOB, addresses=("10.0.0.2:7002",))], True),
        ([replace(BOB, usable=1200)], True),
    ],
    ids=["nothing", "noise", "less", "gone", "come", "its agent started anew", "memory is free"],
)
def test_news_of_machines(now: list[ServiceRecord], news: bool) -> None:
    assert has_changed({"bob": BOB}, {record.name: record for record in now}) is news


async def test_a_machine_that_comes_while_a_plan_is_made_is_no_lost_news() -> None:
    cluster = Cluster.new()
    members = Members(cluster, cluster.issue("ann"))
    before = members.found
    members._browser.found = {"bob": BOB}  # before anyone waits for it

    assert await members.changed(scaled(60), before)
    assert not await members.changed(0.01)


class Recovering(Service):
    """A service that has lost its deployment, and for which each attempt to plan goes so."""

    def __init__(self, members: Any, *attempts: Callable[[], Awaitable[Deployment]]) -> None:
        self.source: Any = SimpleNamespace(display="llama")
        self.deployment = None
        self.reasons: list[str] = []
        self.planned = asyncio.Event()
        self._left_to_try = list(attempts)
        self._life = lifecycle.State(lifecycle.Phase.WAITING, ring=1, begun=True)
        self._members = members
        self._events: Any = SimpleNamespace(losses=Counter(), publish=lambda event: None)
        self._left: Any = SimpleNamespace(close=self._nothing)
        self._comes_back = False
        self._turned, self._changed = asyncio.Event(), asyncio.Event()
        self._lost: list[Machine] = []
        self._seen = None
        self._pauses = Pauses(lambda seconds: members.changed(seconds, self._seen))

    async def _nothing(self) -> None:
        pass

    async def _planned(self, lost: Sequence[Machine]) -> Deployment:
        self.reasons.append(self._life.problem)
        if not self._left_to_try:
            self.planned.set()
            await asyncio.Future()
        return await self._left_to_try.pop(0)()


def members_of(*records: ServiceRecord) -> Members:
    cluster = Cluster.new()
    members = Members(cluster, cluster.issue("ann"))
    members._browser.found = {record.name: record for record in records}
    return members


async def hang() -> Deployment:
    return await asyncio.Future()


def failing(error: Exception) -> Callable[[], Awaitable[Deployment]]:
    async def fail() -> Deployment:
        raise error

    return fail


async def run_until_planned(service: Recovering) -> None:
    running = asyncio.create_task(service.run())
    try:
        planned = asyncio.create_task(service.planned.wait())
        await asyncio.wait(
            [running, planned], timeout=scaled(60), return_when=asyncio.FIRST_COMPLETED
        )
        assert planned.done(), service.reasons
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_plan_that_hangs_fails_or_finds_no_room_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "PLAN_SECONDS", 0.2)
    monkeypatch.setattr(serving, "FIRST_RETRY_SECONDS", 0.01)
    service = Recovering(
        members_of(BOB),
        *(hang, failing(FailpointError("serve.plan")), failing(DoesNotFitError("no room"))),
    )

    await run_until_planned(service)

    assert service.reasons[1:] == [
        "no plan was made within 0 s",
        "a plan could not be made: FailpointError: serve.plan",
        "no room",
    ]


async def test_pauses_that_have_grown_are_short_while_an_answer_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "FIRST_RETRY_SECONDS", HOUR)
    monkeypatch.setattr(serving, "LAST_RETRY_SECONDS", HOUR)
    monkeypatch.setattr(pauses, "WAITED_SECONDS", 0.01)
    late = failing(UnavailableError("machine bob does not answer"))
    service = Recovering(members_of(BOB), *[late] * 9)
    patience = lifecycle.BrokenOff(1, UnavailableError("lost"), 1, 0.0, 0.0, HOUR)
    waiting = asyncio.create_task(service.until_serving(lambda: patience))
    await asyncio.sleep(0)

    await run_until_planned(service)

    assert len(service.reasons) == 10
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_machine_that_comes_during_an_attempt_begins_the_pauses_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(serving, "LAST_RETRY_SECONDS", HOUR)
    members = members_of()
    late = failing(UnavailableError("nobody answers"))

    async def comes() -> Deployment:
        members._browser.found = {"bob": BOB}
        return await late()

    service = Recovering(members, *[late] * 3, comes, late)
    asked: list[float] = []
    changed = service._pauses._changed

    async def listening(seconds: float) -> bool:
        asked.append(seconds)
        return await changed(seconds)

    service._pauses._changed = listening
    await run_until_planned(service)

    assert asked[:4] == sorted(asked[:4])
    assert asked[4] <= 0.01 < 0.08 / 2 <= asked[3]


async def test_no_machine_is_asked_for_files_of_a_model_that_no_hub_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that does not answer would cost each attempt to plan ten seconds."""
    monkeypatch.setattr(sourcing, "connect", None)
    identity = Cluster.new().issue("ann")
    files = [WeightFile(name="model.safetensors", size=9, layers=[0, 1], outside=True)]

    for model in ("/models/llama", "demo"):
        agents = ["10.0.0.2:7001", "10.0.0.3:7001"]
        asked = hub_files(model, "1", files, [(0, 1), (1, 2)], agents, agents, identity)
        assert await asked == [[], []]
