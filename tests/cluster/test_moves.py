"""Machines that come are used where that makes the plan better, and no answer is cut."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.fleet.measured import FILE
from tests.support.cluster import LocalCluster, Result, ServeProgram, endless_model, until
from unicluster.client.answers import Delta, Status

# One such machine does not hold the tiny model, two do.
MEMORY = 1_100_000
# A frame of a head takes so long that an answer outlasts the time it has before a move.
SLOW = {"UNICLUSTER_FAILPOINTS": "head.compute=delay(1000)"}
TOKENS = 200
# Layers 0 to 2 take a token so long, in seconds; shorter answers than 16 tokens change nothing.
MEASURED = {"ann": 0.1, "bob": 0.1, "cid": 0.0001, "bad": 0.0001}
SHORT = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Machines of which cid is known to be much faster, however busy this one is."""
    with LocalCluster(tmp_path / "cluster") as cluster:
        rows = {
            name: {"llama": {"first": 0, "end": 3, "seconds_per_token": seconds}}
            for name, seconds in MEASURED.items()
        }
        cluster.home.mkdir(parents=True)
        (cluster.home / FILE).write_text(json.dumps({"stages": rows, "hops": {}}))
        yield cluster


def holders(server: ServeProgram) -> list[str]:
    return [stage.node for stage in server.describe().stages]


def test_a_machine_that_comes_takes_over_when_it_saves_enough(
    cluster: LocalCluster, model: Path
) -> None:
    cluster.start_agents("ann", "bob", memory=MEMORY)
    options = ("--context", "512", "--rebalance-after", "1")
    with cluster.serve(model, *options) as server, server.client() as client:
        before = client.chat("hello", max_tokens=SHORT, temperature=0).text
        cluster.start_agents("cid")  # alone it needs no hops
        until(lambda: holders(server) == ["cid"], "cid holds the model")
        until(lambda: server.describe().state == "ready", "the model answers")
        after = client.chat("hello", max_tokens=SHORT, temperature=0).text
        cluster.agents.pop("cid").end()
        until(lambda: sorted(holders(server)) == ["ann", "bob"], "the others hold it again")
        until(lambda: server.describe().state == "ready", "the model answers again")
        again = client.chat("hello", max_tokens=SHORT, temperature=0).text

    assert before == after == again
    assert "% less time a token: " in server.out
    logged = [json.loads(line) for line in cluster.run("events", "--json").out.splitlines()]
    assert [event["kind"] for event in logged].count("moving") == 1


@pytest.mark.sweep
def test_rebalance_shows_both_plans_and_asks_before_it_moves(
    cluster: LocalCluster, model: Path
) -> None:
    cluster.start_agents("ann", "bob", memory=MEMORY)
    options = ("--context", "512", "--rebalance", "off")
    with cluster.serve(model, *options) as server, server.client() as client:
        before = client.chat("hello", max_tokens=SHORT, temperature=0).text
        nothing = rebalance(cluster, server)
        cluster.start_agent("bad", UNICLUSTER_FAILPOINTS="worker.load=panic").wait_for("Ctrl-C")
        standing = set(holders(server))
        refused = rebalance(cluster, server)
        failed = rebalance(cluster, server, "--yes")
        stayed = set(holders(server)) == standing and server.describe().state == "ready"
        cluster.agents.pop("bad").end()
        cluster.start_agents("cid")
        moved = rebalance(cluster, server, "--yes")
        after = client.chat("hello", max_tokens=SHORT, temperature=0).text

        assert holders(server) == ["cid"]

    assert nothing.code == 0
    assert nothing.out.endswith("No other plan is faster: nothing moves.\n")
    assert refused.code == 2
    assert re.search(r"^bad +0-5 ", refused.out, re.MULTILINE)
    assert refused.err == "unicluster: nobody can be asked here: --yes moves the layers\n"
    assert failed.code == 1
    assert "llama answers where it did: machine bad" in failed.err
    assert stayed
    assert moved.code == 0, moved.err
    assert moved.out.endswith("llama answers from the new plan.\n")
    assert before == after


def rebalance(cluster: LocalCluster, server: ServeProgram, *options: str) -> Result:
    return cluster.run("rebalance", "--server", server.address, *options)


@pytest.mark.sweep
def test_an_answer_that_outlasts_the_move_goes_on_in_its_stream(
    cluster: LocalCluster, model: Path
) -> None:
    for name in ("ann", "bob"):
        cluster.start_agent(name, memory=MEMORY, **SLOW)
    cluster.wait_for_agents()
    options = ("--context", "512", "--rebalance-after", "1")
    with cluster.serve(model, *options) as server:
        text, statuses = asyncio.run(streamed(server, lambda: cluster.start_agents("cid")))

        assert holders(server) == ["cid"]
        undisturbed, silence = asyncio.run(streamed(server))

    assert text == undisturbed
    assert not silence
    assert [status.state for status in statuses] == ["recovering", "resumed"]
    assert statuses[0].detail == "its layers move to other machines"


async def streamed(server: ServeProgram, begun: object = None) -> tuple[str, list[Status]]:
    """Text of a long answer, and what its client was told; `begun` is called at its first token."""
    statuses: list[Status] = []
    text, call = "", begun
    async with server.async_client() as client:
        events = client.stream("hello", max_tokens=TOKENS, temperature=0, on_status=statuses.append)
        async for event in events:
            if isinstance(event, Delta):
                text += event.text
                if callable(call):
                    await asyncio.to_thread(call)
                    call = None
    return text, statuses
