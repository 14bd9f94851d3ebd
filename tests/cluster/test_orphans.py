"""Stages whose coordinator was killed: the next one adopts them, replaces them, or they end."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until

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
