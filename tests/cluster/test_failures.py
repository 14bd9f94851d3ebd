"""Any process of the cluster is killed in the middle of answers: what clients and machines see.

Each test lasts as long as loading the model again does; a machine that falls asleep is noticed
only when its connections have been silent for 3.5 s.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from tests.support.strikes import (
    CONTEXT,
    NOTICED_WITHIN,
    assert_answers_again,
    assert_answers_end,
    assert_sleep_is_survived,
    errors_after,
)
from unicluster.errors import UnavailableError

# Three machines hold the model, two do not: the others take the place of those that are lost.
MACHINES = ("ann", "bob", "cat", "dee", "eve", "fay", "gus", "hal")
MEMORY = 5_500_000
# Errors are looked at here; how answers go on is in test_recovery.py.
SERVE = ("--context", str(CONTEXT), "--users", "2", "--recover", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, model: Path) -> Iterator[ServeProgram]:
    with cluster.serve(model, *SERVE) as server:
        yield server


@pytest.fixture
def stages(cluster: LocalCluster, server: ServeProgram) -> list[AgentProgram]:
    """The machines that hold stages now, the head first. At least one is to spare."""
    cluster.agents = {name: agent for name, agent in cluster.agents.items() if agent.running}
    if len(cluster.agents) < 4:
        cluster.start_agents(f"ivy-{os.urandom(3).hex()}", memory=MEMORY)
    until(lambda: server.describe().state == "ready", "the model is served")
    return [cluster.agents[stage.node] for stage in server.describe().stages]


@pytest.mark.parametrize(
    ("which", "place"), [("middle", 1), ("last", 2), ("head", 0)], ids=["middle", "last", "head"]
)
async def test_a_worker_is_killed(
    server: ServeProgram, stages: list[AgentProgram], which: str, place: int
) -> None:
    agent = stages[place]

    await assert_answers_end(server, agent.worker.kill, agent.name)

    await assert_answers_again(server)
    assert agent.name in {stage.node for stage in server.describe().stages}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "leaves"])
@pytest.mark.parametrize("place", [1, 0], ids=["middle", "head"])
async def test_an_agent_is_killed_or_leaves(
    server: ServeProgram, stages: list[AgentProgram], place: int, number: signal.Signals
) -> None:
    agent = stages[place]
    worker = agent.worker

    await assert_answers_end(server, lambda: agent.send(number), agent.name)

    agent.result()
    until(lambda: not worker.is_running(), "its worker is gone too", 5)
    await assert_answers_again(server)
    assert agent.name not in {stage.node for stage in server.describe().stages}


@pytest.mark.parametrize("place", [1, 2, 0], ids=["middle", "last", "head"])
async def test_a_machine_falls_asleep(
    server: ServeProgram, stages: list[AgentProgram], place: int
) -> None:
    agent = stages[place]
    worker = await assert_sleep_is_survived(server, agent)

    until(lambda: not worker.is_running(), "its worker is gone once it wakes up", 10)
    assert agent.running


async def test_what_remains_is_too_small_until_a_machine_joins(
    cluster: LocalCluster, server: ServeProgram, stages: list[AgentProgram]
) -> None:
    spare = [agent for agent in cluster.agents.values() if agent not in stages]
    for agent in spare:
        agent.send(signal.SIGTERM)
    for agent in spare:
        agent.result()

    await assert_answers_end(server, stages[1].kill, stages[1].name)

    until(lambda: server.describe().state == "failed", "it knows that nothing can be done")
    with pytest.raises(UnavailableError) as refusal:
        server.client().chat("hello")
    print(refusal.value)
    assert re.fullmatch(
        r"llama can't be served: llama with context 4096 for 2 users needs 1\d\.\d MB and the 2 "
        r"machines offer 11\.0 MB: \d\.\d MB are missing, in whole layers\. One more machine with "
        r".* would do.*",
        str(refusal.value),
    )
    cluster.start_agent("new", memory=MEMORY)
    await assert_answers_again(server)


async def test_the_coordinator_is_killed(
    cluster: LocalCluster, server: ServeProgram, stages: list[AgentProgram]
) -> None:
    """The last test with the server of this module, because it ends it."""
    errors = await errors_after(server, server.kill)

    for seconds, error in errors:
        print(f"{seconds:.2f} s: {type(error).__name__}: {error}")
        assert isinstance(error, UnavailableError)
        assert server.address in str(error)
        assert seconds < scaled(NOTICED_WITHIN)
    assert all(agent.running for agent in stages)
    assert all(agent.workers for agent in stages)  # for the next one: see test_orphans


async def test_the_coordinator_is_told_to_end(
    cluster: LocalCluster, server: ServeProgram, model: Path
) -> None:
    with server if server.running else cluster.serve(model, *SERVE) as server:
        errors = await errors_after(server, lambda: server.send(signal.SIGTERM))

        for seconds, error in errors:
            print(f"{seconds:.2f} s: {type(error).__name__}: {error}")
            assert isinstance(error, UnavailableError)
            assert str(error) == "the model is being unloaded"
            assert seconds < scaled(NOTICED_WITHIN)
        assert server.result().code == 0
        assert not cluster.workers()  # it waited for them
