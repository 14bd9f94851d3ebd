"""Stages of ggml keep the promises of the others when a machine is lost in mid-answer."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, endless_model
from tests.support.strikes import (
    CONTEXT,
    assert_answers_again,
    assert_answers_end,
    assert_sleep_is_survived,
    status_while_answering,
)
from tests.support.tiny_gguf import from_checkpoint, write_gguf

# Three of these machines hold the model, two do not.
MACHINES = ("ann", "bob", "cat", "dee")
MEMORY = 6_500_000
SERVE = ("--context", str(CONTEXT), "--users", "2", "--recover", "0")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, HF_HOME=str(folder / "hf")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProgram]:
    folder = tmp_path_factory.mktemp("models")
    file = from_checkpoint(endless_model(folder / "llama"), folder / "llama.gguf")
    with cluster.serve(file, *SERVE) as server:
        yield server


def test_llama_cpp_s_reason_reaches_who_typed_serve(cluster: LocalCluster, tmp_path: Path) -> None:
    """That there are as many rows as heads, nobody but llama.cpp looks at."""
    file = write_gguf(tmp_path / "odd.gguf", metadata={"attention.head_count_kv": 1})

    told = cluster.serve(file, "--context", "64", "--nodes", "ann,bob").result()

    assert told.code == 1
    assert re.search(
        r"machine \w+: llama\.cpp can't load .*: .*'blk\.0\.attn_k\.weight' has wrong shape",
        " ".join(told.err.split()),
    )


def stage(cluster: LocalCluster, server: ServeProgram, place: int) -> AgentProgram:
    stages = server.describe().stages
    assert len(stages) == 3
    return cluster.agents[stages[place].node]


@pytest.mark.parametrize("place", [1, 0], ids=["middle", "head"])
async def test_a_worker_is_killed(cluster: LocalCluster, server: ServeProgram, place: int) -> None:
    agent = stage(cluster, server, place)
    strike: Callable[[], None] = agent.worker.kill

    await assert_answers_end(server, strike, agent.name)

    await assert_answers_again(server)


async def test_a_machine_falls_asleep(cluster: LocalCluster, server: ServeProgram) -> None:
    await assert_sleep_is_survived(server, stage(cluster, server, 2))


def test_status_has_the_figures_of_all_stages(cluster: LocalCluster, server: ServeProgram) -> None:
    status = status_while_answering(cluster, server, tokens=CONTEXT - 100)

    assert all(0 < stage["busy"] <= 1 for stage in status["stages"])
    assert all(hop["decode_s"] > 0 for hop in status["hops"])
