"""A coordinator ends in the middle of answers, and its clients get the rest from the next one."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import free_port
from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from unicluster.client.answers import Answer, Status, collect
from unicluster.client.client import AsyncClient

MEMORY = 2_700_000
# Long enough that no machine ends them before a signal arrives that is sent at the tenth token.
TOKENS = 400
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.5, "seed": 7, "regex": "[a-z]{400}"},
}
COMES_BACK_FOR = 300.0
# Whose caches are kept while it is away; those of the other are not, for it is not to be reused.
REUSED = "greedy"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents("ann", "bob", memory=MEMORY)
        yield cluster


async def hear(
    client: AsyncClient,
    kind: str,
    on_token: Callable[[], None] = lambda: None,
    on_status: Callable[[Status], None] = lambda status: None,
    *,
    reuse: bool = False,
) -> Answer:
    events = []
    async for event in client.stream(
        f"about {kind}",
        max_tokens=TOKENS,
        no_reuse=not reuse,
        on_status=on_status,
        **KINDS[kind],
    ):
        events.append(event)
        on_token()
    return collect(events)


def seen(answer: Answer) -> list[Any]:
    usage = answer.usage
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    return [answer.text, answer.token_ids, answer.finish_reason, counts]


@pytest.mark.parametrize(
    ("number", "resume"),
    [
        (signal.SIGKILL, COMES_BACK_FOR),
        pytest.param(signal.SIGTERM, None, marks=pytest.mark.sweep),
    ],
    ids=["killed", "stopped"],
)
async def test_answers_go_on_with_the_next_coordinator(
    cluster: LocalCluster, model: Path, number: signal.Signals, resume: float | None
) -> None:
    port = str(free_port())

    def serve() -> ServeProgram:
        return cluster.serve(model, "--context", "1024", "--users", "2", "--grpc-port", port)

    statuses: list[Status] = []
    begun = {kind: asyncio.Event() for kind in KINDS}
    counts = dict.fromkeys(KINDS, 0)

    def count(kind: str) -> None:
        counts[kind] += 1
        if counts[kind] == 10:
            begun[kind].set()

    with serve() as first:
        async with AsyncClient(first.address, cluster=cluster.cluster, resume=resume) as client:
            whole = {kind: await hear(client, kind) for kind in KINDS}
            answers = [
                asyncio.create_task(
                    hear(
                        *(client, kind, lambda k=kind: count(k), statuses.append),
                        reuse=kind == REUSED,
                    )
                )
                for kind in KINDS
            ]
            workers = {worker.pid for worker in cluster.workers()}
            async with asyncio.timeout(scaled(COMES_BACK_FOR)):
                await asyncio.gather(*(event.wait() for event in begun.values()))
                first.send(number)
                second = serve()
                again = await asyncio.gather(*answers)
                with second, second.client() as of_second:
                    adopted = {worker.pid for worker in cluster.workers()}
                    counted = of_second.measure().recoveries
                    until(lambda: not of_second.describe().live_caches, "caches are free")

    for kind, answer in zip(KINDS, again, strict=True):
        assert seen(answer) == seen(whole[kind]), kind
    # A coordinator that is stopped says first that it is recovering: its stages end before it does.
    states = sorted(status.state for status in statuses if status.state != "recovering")
    assert states == ["lost", "lost", "resumed", "resumed"]
    if number == signal.SIGKILL:
        assert adopted == workers  # nothing was loaded again
        had = whole[REUSED].usage.prompt_tokens
        assert counted.returned == 2
        assert counted.cached_tokens > had  # nor computed again
