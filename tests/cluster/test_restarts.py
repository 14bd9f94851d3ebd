"""`serve` is killed and started again, or started twice: what the state file and machines tell."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.state.database import NAME
from tests.support.cluster import LocalCluster, endless_model
from tests.support.deadlines import scaled

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


def leave_stages(cluster: LocalCluster, model: Path) -> set[int]:
    """Pids of the workers of a coordinator that is killed."""
    with cluster.serve(model, *SERVE) as server:
        pids = {worker.pid for worker in cluster.workers()}
        server.kill()
    return pids


@pytest.mark.sweep
def test_a_damaged_record_costs_time_and_nothing_else(cluster: LocalCluster, model: Path) -> None:
    pids = leave_stages(cluster, model)
    with sqlite3.connect(cluster.home / NAME) as database:
        assert database.execute("UPDATE services SET cut = '[]'").rowcount == 1
    database.close()

    with cluster.serve(model, *SERVE) as server, server.client() as client:
        assert client.chat("hello", max_tokens=4).usage.completion_tokens == 4
        # The plan comes out equal anyway.
        assert {worker.pid for worker in cluster.workers()} == pids
        assert "state file: " in server.err
        assert "Traceback" not in server.err


@pytest.mark.sweep
def test_a_machine_that_is_gone_is_planned_around(cluster: LocalCluster, model: Path) -> None:
    leave_stages(cluster, model)
    cluster.agents.pop("bob").end()

    cluster.start_agent("cid", memory=MEMORY)
    cluster.wait_for_agents()
    with cluster.serve(model, *SERVE) as server:
        assert {stage.node for stage in server.describe().stages} == {"ann", "cid"}
    cluster.agents.pop("cid").end()
    cluster.start_agents("bob", memory=MEMORY)


@pytest.mark.sweep
def test_a_model_that_has_changed_is_loaded_anew(
    cluster: LocalCluster, model: Path, tmp_path: Path
) -> None:
    changing = tmp_path / "llama"
    shutil.copytree(model, changing)
    pids = leave_stages(cluster, changing)
    (changing / "tokenizer_config.json").open("a").write(" ")

    with cluster.serve(changing, *SERVE) as server:
        assert server.describe().state == "ready"
        assert not pids & {worker.pid for worker in cluster.workers()}


def test_a_second_coordinator_is_refused_and_the_first_goes_on(
    cluster: LocalCluster, model: Path
) -> None:
    with cluster.serve(model, *SERVE) as server, server.client() as client:
        assert wanted(cluster) == [("llama",)]
        second = cluster.serve(model, *SERVE).result()

        assert second.code == 2
        (line,) = second.err.splitlines()
        assert line.startswith("unicluster: llama is served already, from ")
        assert line.endswith(": end that first, or serve it once more with --service NAME")
        assert client.chat("hello", max_tokens=4).usage.completion_tokens == 4
    assert not wanted(cluster)  # the end was a clean one


@pytest.mark.sweep
def test_a_second_coordinator_on_another_host_is_refused(
    cluster: LocalCluster, model: Path, tmp_path: Path
) -> None:
    with cluster.serve(model, *SERVE) as server, LocalCluster(tmp_path / "other") as other:
        joined = other.start(
            *("join", "--name", "zoe", "--host", "127.0.0.1", "--token", cluster.cluster.token),
        )
        joined.wait_for("Ctrl-C leaves")
        joined.end()
        second = other.serve(model, *SERVE, "--peer", cluster.agents["ann"].address).result()

        assert second.code == 2
        (line,) = second.err.splitlines()
        assert line.startswith("unicluster: llama is served already, from ")
        assert server.address.rpartition(":")[2] in line
        assert server.describe().state == "ready"


@pytest.mark.sweep
def test_a_coordinator_that_was_stopped_and_not_killed_blocks_nobody_for_long(
    cluster: LocalCluster, model: Path
) -> None:
    """Its successor waits while it unloads, as a service manager's restart has it."""
    with cluster.serve(model, *SERVE) as first:
        second = cluster.serve(model, *SERVE)
        first.end()
        with second:
            assert second.describe().state == "ready"


def wanted(cluster: LocalCluster) -> list[tuple[str]]:
    with sqlite3.connect(cluster.home / NAME, timeout=scaled(5)) as database:
        rows: list[tuple[str]] = database.execute("SELECT name FROM services").fetchall()
    database.close()
    return rows
