"""Stages whose coordinator was killed: the next one adopts them, replaces them, or they end."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until
from unicluster.checkpoints.fingerprint import whole
from unicluster.cluster.channels import connect_sync
from unicluster.v1.node_pb2 import ReleaseRequest, StageEvent, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub

# One such machine does not hold the tiny model, two do.
MEMORY = 1_100_000
SERVE = ("--context", "512")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents("ann", "bob", memory=MEMORY)
        yield cluster


def killed(cluster: LocalCluster, model: Path, *options: str) -> tuple[list[psutil.Process], str]:
    """The workers that a coordinator leaves which is killed, and what they answered."""
    server = cluster.serve(model, *SERVE, *options)
    with server, server.client() as client:
        text = client.chat("hello", max_tokens=12, temperature=0).text
        workers = cluster.workers()
        server.kill()
    return workers, text


def answer_of(server: ServeProgram) -> str:
    with server.client() as client:
        text: str = client.chat("hello", max_tokens=12, temperature=0).text
        return text


def test_each_coordinator_adopts_those_of_the_one_before_and_loads_nothing(
    cluster: LocalCluster, model: Path
) -> None:
    first, text = killed(cluster, model)
    second, same = killed(cluster, model)

    with cluster.serve(model, *SERVE) as server:
        again = answer_of(server)
        third = cluster.workers()

    assert again == same == text
    assert {w.pid for w in third} == {w.pid for w in second} == {w.pid for w in first}
    for name in cluster.agents:
        assert f"{name}: adopted layers " in server.out
        assert f"{name}: loading" not in server.out
    assert not cluster.workers()  # the end of the last one was a clean one


@pytest.mark.sweep
@pytest.mark.parametrize("options", [("--context", "256"), ("--lookup",)])
def test_a_model_with_other_options_takes_their_place(
    cluster: LocalCluster, model: Path, options: tuple[str, ...]
) -> None:
    workers, _ = killed(cluster, model)

    with cluster.serve(model, *SERVE, *options) as server:
        assert answer_of(server)
        assert "adopted" not in server.out

    assert not any(worker.is_running() for worker in workers)


def test_the_end_of_their_grace_ends_them(cluster: LocalCluster, model: Path) -> None:
    workers, _ = killed(cluster, model, "--orphan-grace", "0.5")

    until(lambda: not any(worker.is_running() for worker in workers), "they are gone")
    until(lambda: cluster.run("nodes").out.count("1.1 MB of") == 2, "their memory is back")


@pytest.mark.sweep
def test_draining_a_machine_ends_them(cluster: LocalCluster, model: Path) -> None:
    workers, _ = killed(cluster, model, "--orphan-grace", "3600")

    for agent in cluster.agents.values():
        drained = cluster.run("drain", "--agent", agent.address)
        assert drained.code == 0, drained.err
    ended = not any(worker.is_running() for worker in workers)
    for agent in cluster.agents.values():
        cluster.run("drain", "--off", "--agent", agent.address)

    assert ended


@pytest.mark.parametrize("seconds", ["-1", "nan", "1e9"])
def test_a_grace_that_is_none_is_refused(cluster: LocalCluster, model: Path, seconds: str) -> None:
    refused = cluster.serve(model, "--orphan-grace", seconds).result()

    assert refused.code == 2
    assert refused.err.startswith(f"unicluster: --orphan-grace {float(seconds):g}: between 0 and ")


def test_a_stage_that_its_own_coordinator_seems_to_hold_still_is_left_for_its_next_one(
    cluster: LocalCluster, model: Path
) -> None:
    """The coordinator's end of the old stream is gone, and its machine has not heard of it yet."""
    first = StageSpec(
        deployment="first",
        model=str(model),
        revision=whole(model).manifest.revision,
        end_layer=1,
        context=512,
        users=1,
        memory=MEMORY - 100_000,
        service="llama",
        coordinator="cat (10.0.0.3:7000)",
        orphan_grace_s=60,
    )
    specs = [StageSpec() for _ in range(3)]
    for spec in specs:
        spec.CopyFrom(first)
    second, third, stranger = specs
    second.deployment, third.deployment, stranger.deployment = "second", "third", "fourth"
    third.end_layer = 2  # another stage: it takes the place of the one that is there
    stranger.coordinator = "dan (10.0.0.4:7000)"
    agent, caller = cluster.agents["ann"], cluster.cluster.issue("cat")
    with connect_sync(agent.address, caller) as channel:
        node = NodeStub(channel)
        held = node.RunStage(first)
        seen = until_ready(held)
        (worker,) = agent.workers
        adopting = node.RunStage(second)
        adopted = until_ready(adopting)

        assert not [event for event in seen if event.HasField("adopted")]
        assert adopted[0].HasField("adopted")
        assert [each.pid for each in agent.workers] == [worker.pid]
        assert not [event for event in held if event.HasField("exit")]  # it ends, and its stage not
        with pytest.raises(grpc.RpcError, match="does not fit"):
            next(node.RunStage(stranger))
        assert agent.workers == [worker]

        replacing = node.RunStage(third)
        replaced = until_ready(replacing)

        assert not replaced[0].HasField("adopted")
        assert not worker.is_running()
        assert not [event for event in adopting if event.HasField("ready")]
        node.Release(ReleaseRequest(deployment="third"))
        assert [event for event in replacing if event.HasField("ready")] == []
    assert not agent.workers


def until_ready(stage: Iterator[StageEvent]) -> list[StageEvent]:
    """The events of a stage up to the one that it is ready."""
    events = []
    for event in stage:
        events.append(event)
        if event.HasField("ready"):
            return events
    raise AssertionError(f"it ended before it was ready: {events}")
