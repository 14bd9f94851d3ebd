"""`unicluster drain`: a machine is emptied while the model goes on answering."""

import asyncio
import re
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, endless_model, until

# One such machine does not hold the tiny model, two do.
MEMORY = 1_100_000


def stages_on(cluster: LocalCluster, name: str) -> int:
    return len(cluster.agents[name].workers)


@pytest.mark.sweep
def test_a_drained_machine_is_empty_and_the_others_take_over(tmp_path: Path) -> None:
    model = endless_model(tmp_path / "model")
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", memory=MEMORY)  # alone at first: it makes the cluster
        for name in ("bob", "cid"):
            cluster.start_agent(name, memory=MEMORY)
        cluster.wait_for_agents()
        with cluster.serve(model, "--context", "512") as server, server.client() as client:
            busy = next(name for name in cluster.agents if stages_on(cluster, name))

            drained = cluster.run("drain", busy)
            nodes = cluster.run("nodes").out
            answer = client.chat("hello", max_tokens=8)
            empty = stages_on(cluster, busy) == 0
            back = cluster.run("drain", "--undo", busy)
            cluster.run("drain", "--off", "--agent", cluster.agents[busy].address)

    assert (drained.code, back.code) == (0, 0), drained.err + back.err
    taken, emptied = drained.out.splitlines()
    assert re.fullmatch(rf"Others take over layers \d+-\d+ of .*/model from {busy}\.", taken)
    assert (
        emptied == f"{busy} is empty and takes nothing new until `unicluster drain --undo {busy}`."
    )
    (line,) = (line for line in nodes.splitlines() if line.startswith(f"{busy} "))
    assert "drained of" in line
    assert back.out == f"{busy} offers its memory again.\n"
    assert answer.usage.completion_tokens == 8
    assert empty


@pytest.mark.sweep
def test_a_drained_machine_stays_drained_when_everything_starts_again(tmp_path: Path) -> None:
    model = endless_model(tmp_path / "model")
    serve = ("--context", "512", "--orphan-grace", "0")
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", "bob", "cid", memory=MEMORY)
        with cluster.serve(model, *serve) as server:
            cluster.run("drain", "bob")
            until(lambda: server.describe().state == "ready", "others have taken over")
        for agent in cluster.agents.values():
            agent.end()
        cluster.start_agents("ann", "bob", "cid", memory=MEMORY)

        with cluster.serve(model, *serve) as server:
            used = {stage.node for stage in server.describe().stages}
            shown = cluster.run("nodes").out
            undone = cluster.run("drain", "--undo", "bob")
            cluster.agents.pop("cid").end()  # so that bob is needed

            def holders() -> set[str]:
                return {stage.node for stage in server.describe().stages}

            until(lambda: holders() == {"ann", "bob"}, "bob is used again")

    assert used == {"ann", "cid"}
    assert re.search(r"^bob .*drained of", shown, re.MULTILINE)
    assert "is still drained: `unicluster drain --undo bob` offers it again" in server.err
    assert undone.code == 0


def test_a_model_is_taken_down_only_on_purpose(tmp_path: Path) -> None:
    model = endless_model(tmp_path / "model")
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", "bob", memory=MEMORY)
        with cluster.serve(model, "--context", "512") as server:
            refused = cluster.run("drain", "bob")
            answers = server.describe().state
            unknown = cluster.run("drain", "bobby")
            drained = cluster.run("drain", "bob", "--yes")
            until(lambda: server.describe().state == "failed", "the model has stopped")
            cluster.run("drain", "bob", "--undo")
            until(lambda: server.describe().state == "ready", "the model is back")

    assert refused.code == 2
    assert re.fullmatch(
        r"unicluster: .*/model stops: the other machines have \S+ [kM]B too little for "
        r"layers \d+-\d+ of .*/model: --yes drains bob anyway\n",
        refused.err,
    )
    assert answers == "ready"
    assert unknown.code == 2
    assert "no machine 'bobby' answers in this cluster: there are ann, bob" in unknown.err
    assert drained.code == 0, drained.err


@pytest.mark.parametrize("seconds", ["-3", "nan"])
def test_a_deadline_that_is_none_is_refused(seconds: str, tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        refused = cluster.run("drain", "--timeout", seconds)

    assert refused.code == 2
    assert refused.err == f"unicluster: --timeout {seconds}: a number of seconds, 0 or more\n"


@pytest.mark.sweep
def test_draining_lets_a_running_answer_end(tmp_path: Path) -> None:
    model = endless_model(tmp_path / "model")
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", memory=MEMORY)
        for name in ("bob", "cid"):
            cluster.start_agent(name, memory=MEMORY)
        cluster.wait_for_agents()
        with cluster.serve(model, "--context", "512") as server:
            busy = next(name for name in cluster.agents if stages_on(cluster, name))

            async def ask() -> int:
                async with server.async_client() as client:
                    answering = asyncio.create_task(client.chat("hello", max_tokens=300))
                    await asyncio.sleep(0)
                    draining = cluster.start("drain", "--agent", cluster.agents[busy].address)
                    answer = await answering
                    until(lambda: not draining.running, "it is drained")
                    assert draining.result().code == 0
                    return answer.usage.completion_tokens

            assert asyncio.run(ask()) == 300
