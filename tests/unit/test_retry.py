"""The policy for trying again, without waiting."""

import logging

import pytest

from unicluster.retry import attempts, attempts_in_thread, succeeded


class Pauses(list[float]):
    """Instead of waiting: how long each pause was to be."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def lost(error: BaseException) -> bool:
    return isinstance(error, ConnectionError)


async def test_pauses_double_up_to_the_last() -> None:
    pauses = Pauses()
    async for attempt in attempts("work", lost, first=1, last=4, pause=pauses):
        with attempt:
            if len(pauses) < 5:
                raise ConnectionError

    for pause, longest in zip(pauses, (1, 2, 4, 4, 4), strict=True):
        assert longest / 2 <= pause <= longest


async def test_machines_do_not_pause_alike() -> None:
    pauses = Pauses()
    async for attempt in attempts("work", lost, first=60, last=60, pause=pauses):
        with attempt:
            if len(pauses) < 5:
                raise ConnectionError

    assert len(set(pauses)) == 5


async def test_pauses_begin_anew_after_a_success() -> None:
    pauses = Pauses()
    async for attempt in attempts("work", lost, first=1, last=64, pause=pauses):
        with attempt:
            if len(pauses) == 4:
                succeeded(attempt)
            if len(pauses) < 6:
                raise ConnectionError

    assert pauses[3] >= 4
    assert pauses[4] <= 1
    assert 1 <= pauses[5] <= 2


async def test_what_does_not_pass_is_raised_at_once() -> None:
    pauses = Pauses()

    async def work() -> None:
        async for attempt in attempts("work", lost, first=1, last=4, pause=pauses):
            with attempt:
                raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await work()
    assert pauses == []


def test_a_thread_gives_up_after_so_many(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tried = 0

    def work() -> None:
        nonlocal tried
        for attempt in attempts_in_thread("file", lost, count=3, first=0.01, last=0.01):
            with attempt:
                tried += 1
                raise ConnectionError(f"number {tried}")

    with pytest.raises(ConnectionError, match="number 3"):
        work()
    assert [record.getMessage() for record in caplog.records] == [
        "file: number 1; trying again in 0.0 s",
        "file: number 2; trying again in 0.0 s",
    ]
