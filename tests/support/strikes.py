"""Kills processes of a cluster in the middle of answers, and checks what clients see."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, until
from tests.support.deadlines import scaled
from unicluster.client.answers import Delta
from unicluster.client.client import AsyncClient
from unicluster.errors import StageError, UnavailableError

CONTEXT = 4096
# The promises, in seconds on an idle machine.
NOTICED_WITHIN = 5.0
ANSWERS_WITHIN = 20.0
FREED_WITHIN = 5.0


async def hear_out(client: AsyncClient, begun: asyncio.Event) -> None:
    """An answer of thousands of tokens; sets `begun` when its first one has come."""
    async for event in client.stream("hello", temperature=0, max_tokens=CONTEXT - 100):
        if isinstance(event, Delta):
            begun.set()


async def errors_after(
    server: ServeProgram, strike: Callable[[], None]
) -> list[tuple[float, BaseException | None]]:
    """Strikes while two answers run; what ended each, and after how many seconds."""
    async with server.async_client(resume=0) as client:
        begun = [asyncio.Event() for _ in range(2)]
        answers = [asyncio.create_task(hear_out(client, event)) for event in begun]
        async with asyncio.timeout(scaled(30)):
            await asyncio.gather(*(event.wait() for event in begun))
        struck = time.monotonic()
        strike()
        ended = []
        for answer in answers:
            await asyncio.wait([answer], timeout=scaled(30))
            ended.append((time.monotonic() - struck, answer.exception()))
        return ended


async def assert_answers_end(server: ServeProgram, strike: Callable[[], None], name: str) -> None:
    """Every stream ends in time with a typed error that names the machine."""
    for seconds, error in await errors_after(server, strike):
        print(f"{seconds:.2f} s: {type(error).__name__}: {error}")
        assert isinstance(error, UnavailableError | StageError)
        assert f"machine {name} " in str(error)
        assert "\n" not in str(error)
        assert seconds < scaled(NOTICED_WITHIN)


async def assert_sleep_is_survived(server: ServeProgram, agent: AgentProgram) -> psutil.Process:
    """A machine falls asleep in mid-answer, and wakes up when others answer. Its worker."""
    machine = [agent.worker, psutil.Process(agent.pid)]

    def sleep() -> None:
        for process in machine:
            process.suspend()

    try:
        await assert_answers_end(server, sleep, agent.name)
        await assert_answers_again(server)
    finally:
        for process in machine:
            process.resume()
    return machine[0]


async def assert_answers_again(server: ServeProgram) -> None:
    """The next request works, perhaps after a while in which the error says why it does not."""
    started = time.monotonic()
    reported = ""
    async with server.async_client() as client:
        while True:
            try:
                answer = await client.chat("hello", temperature=0, max_tokens=20)
                break
            except UnavailableError as error:
                if str(error) != reported:
                    reported = str(error)
                    print(f"{time.monotonic() - started:.2f} s: {reported}")
                assert "\n" not in reported
                assert time.monotonic() - started < scaled(ANSWERS_WITHIN)
                await asyncio.sleep(0.25)
        print(f"{time.monotonic() - started:.2f} s: answers again")
        assert len(answer.token_ids) == 20
        async with asyncio.timeout(scaled(FREED_WITHIN)):
            while (await client.describe()).live_caches:
                pass  # each question takes its time


def status_while_answering(cluster: LocalCluster, server: ServeProgram, tokens: int) -> Any:
    """`status --json` of a moment in which an answer of so many tokens is decoding.

    Asked again where the answer ended before the command had both its readings.
    """

    def status() -> Any:
        with server.client() as client:
            events = client.stream("hello", temperature=0, max_tokens=tokens)
            next(events)
            status = json.loads(cluster.run("status", "--json", "--server", server.address).out)
            events.close()
        return status if status["running"] and status["tokens_per_s"] else None

    return until(status, "an answer outlives the command")
