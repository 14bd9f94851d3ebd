"""Workers are killed or freeze, and clients leave, while guesses are on their way.

The model drafts for itself, so that guesses are right and the pipe is full of them; each stage
takes some milliseconds more, or it would not pay. Its cluster starts for these tests alone, and
each recovery loads: a sweep.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from unicluster import failpoints
from unicluster.client.answers import Finish
from unicluster.client.client import AsyncClient

pytestmark = pytest.mark.sweep

# Two machines can hold the model and its draft; where more are expected to be faster, it is on all.
MACHINES = ("ann", "bob", "cat")
MEMORY = 4_000_000
TOKENS = 300
STRUCK_AT = 60  # tokens
GOES_ON_WITHIN = 90.0
PAD = "head.compute=delay(4);stage.compute=delay(8)"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": {"temperature": 0.7, "seed": 7, "top_p": 0.95, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    padded = {failpoints.VARIABLE: PAD}
    with LocalCluster(tmp_path_factory.mktemp("cluster"), **padded) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProgram]:
    model = endless_model(tmp_path_factory.mktemp("models") / "llama")
    options = ("--context", "512", "--users", "2", "--speculate", str(model))
    with cluster.serve(model, *options) as server:
        yield server


async def hear(
    client: AsyncClient, kind: str, on_token: Callable[[int], None] = lambda _: None
) -> tuple[list[int], Finish | None]:
    """Tokens of an answer that is alone, and how it finished."""
    tokens: list[int] = []
    finish = None
    events = client.stream(f"about {kind}", max_tokens=TOKENS, no_reuse=True, **KINDS[kind])
    async for event in events:
        if isinstance(event, Finish):
            finish = event
        else:
            tokens += event.token_ids
            on_token(len(tokens))
    return tokens, finish


def later_stage(cluster: LocalCluster, server: ServeProgram) -> AgentProgram:
    """The machine that holds the last stage of the model, which is served."""
    until(lambda: server.describe().state == "ready", "the model is served")
    stages = server.describe().stages
    assert len(stages) > 1
    return cluster.agents[stages[-1].node]


async def strike_at_each(
    server: ServeProgram, strike: Callable[[], Any], kinds: Iterable[str] = KINDS
) -> None:
    """`strike` is called in the middle of an answer of each kind, whose text stays as it was."""
    async with server.async_client() as client:
        for kind in kinds:
            expected, finish = await hear(client, kind)
            assert finish is not None
            assert finish.usage.accepted_tokens > 0  # so guesses are on their way all the time
            struck: list[None] = []

            def on_token(count: int, struck: list[None] = struck) -> None:
                if count >= STRUCK_AT and not struck:
                    struck.append(strike())

            async with asyncio.timeout(scaled(GOES_ON_WITHIN)):
                tokens, _ = await hear(client, kind, on_token)
            assert struck
            assert tokens == expected
            until(lambda: server.describe().state == "ready", "it is served again")
    until(lambda: server.describe().live_caches == 0, "caches are free")


async def test_a_worker_is_killed(cluster: LocalCluster, server: ServeProgram) -> None:
    await strike_at_each(server, lambda: later_stage(cluster, server).worker.kill())


async def test_a_worker_freezes(cluster: LocalCluster, server: ServeProgram) -> None:
    # To notice it takes the longest, so of one kind alone.
    await strike_at_each(server, lambda: later_stage(cluster, server).worker.suspend(), ["seed"])


async def test_clients_leave(server: ServeProgram) -> None:
    async with server.async_client() as client:
        expected, _ = await hear(client, "seed")
        for at in (1, 2, 7, 40):
            events = client.stream("about greedy", max_tokens=TOKENS, temperature=0)
            count = 0
            async for event in events:
                count += len(getattr(event, "token_ids", ()))
                if count >= at:
                    break
            await events.aclose()

        tokens, _ = await hear(client, "seed")

    assert tokens == expected
    until(lambda: server.describe().live_caches == 0, "caches are free")
