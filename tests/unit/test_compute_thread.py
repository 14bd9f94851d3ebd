"""Fibers: what waits lets others run."""

import asyncio
import threading

from node.ring.compute_thread import MLXThread, Signal, give_way
from tests.support.deadlines import scaled

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
