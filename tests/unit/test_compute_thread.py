"""Fibers: what waits lets others run."""

import asyncio
import threading
import time
from functools import partial

import pytest

from node.ring.compute_thread import MLXThread, Signal, begin, give_way
from node.ring.compute_watch import watch
from tests.support.deadlines import scaled
from unicluster.deadlines import VARIABLE, Work
from unicluster.errors import StageError

THREAD = MLXThread()


async def test_what_waits_lets_others_run() -> None:
    reply, received = Signal(), []

    def waits() -> None:
        received.append("asked")
        reply.wait()
        received.append("went on")

    waiting = asyncio.create_task(THREAD.run(waits))
    await asyncio.sleep(0)  # it is queued first
    await THREAD.run(lambda: received.append("another"))
    reply.set()
    await waiting

    assert received == ["asked", "another", "went on"]


async def test_a_signal_that_is_set_already_does_not_wait() -> None:
    signal, received = Signal(), list[None]()
    signal.set()

    await asyncio.wait_for(THREAD.run(lambda: received.append(signal.wait())), scaled(10))

    assert received == [None]


def test_another_thread_just_waits() -> None:
    signal = Signal()
    waiting = threading.Thread(target=signal.wait, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()

    signal.set()

    waiting.join(scaled(10))
    assert not waiting.is_alive()


async def test_those_that_give_way_take_turns() -> None:
    received: list[str] = []

    def work(name: str) -> None:
        for _ in range(3):
            received.append(name)
            give_way()

    began = threading.Event()
    THREAD.post(began.wait)  # both are queued before the first begins
    both = [asyncio.create_task(THREAD.run(lambda name=name: work(name))) for name in "ab"]  # type: ignore[misc]
    await asyncio.sleep(0)
    began.set()
    await asyncio.gather(*both)

    assert "".join(received) == "ababab"


async def test_an_error_comes_to_who_asked() -> None:
    def fails() -> None:
        give_way()
        raise ValueError("no")

    try:
        await THREAD.run(fails)
    except ValueError as error:
        assert str(error) == "no"  # noqa: PT017


async def test_what_runs_now_can_be_seen() -> None:
    release, entered = threading.Event(), threading.Event()

    def work() -> None:
        begin(Work("prefill", 64))
        entered.set()
        release.wait(scaled(10))

    running = asyncio.create_task(THREAD.run(work))
    await asyncio.to_thread(entered.wait, scaled(10))
    lap = THREAD.running
    release.set()
    await running

    assert lap is not None
    assert str(lap[1]) == "prefill of 64 tokens"


async def test_an_exception_that_nobody_catches_is_an_error_of_the_watch() -> None:
    thread, did = MLXThread(), []
    watching = asyncio.create_task(watch(thread, "machine bob (layers 2 to 4)"))

    thread.post(lambda: 1 // 0)
    thread.post(lambda: did.append("anything"))

    with pytest.raises(StageError, match=r"^machine bob \(layers 2 to 4\): .*ZeroDivisionError: "):
        await asyncio.wait_for(watching, scaled(10))
    assert did == []


async def test_work_that_does_not_end_is_an_error_of_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "0.2")
    thread, release = MLXThread(), threading.Event()
    watching = asyncio.create_task(watch(thread, "machine bob (layers 2 to 4)"))

    thread.post(release.wait, Work("decode"))

    stuck = r"^machine bob \(layers 2 to 4\) has computed nothing for \d+ s: decode$"
    with pytest.raises(StageError, match=stuck):
        await asyncio.wait_for(watching, scaled(20))
    release.set()


async def test_slow_work_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes 20 times as long as before, and less than the floor."""
    monkeypatch.setenv(VARIABLE, "5")
    thread = MLXThread()
    watching = asyncio.create_task(watch(thread, "machine bob (layers 2 to 4)"))

    for seconds in (0.001, 0.02, 0.4):
        await thread.run(partial(time.sleep, seconds), Work("decode"))

    assert not watching.done()
    watching.cancel()


def test_where_the_thread_is_can_be_asked_while_it_is_stuck() -> None:
    thread, began, release = MLXThread(), threading.Event(), threading.Event()

    def waits_for_a_device() -> None:
        began.set()
        release.wait()

    thread.start(waits_for_a_device)
    began.wait()
    stack = thread.stack()
    release.set()

    assert "in waits_for_a_device" in stack
