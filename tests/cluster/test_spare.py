"""A killed worker's place is taken by the spare one of its agent, and then there is another."""

from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, endless_model, until

pytestmark = pytest.mark.sweep  # a whole cluster; the parts are in tests/process/test_spare_worker


def test_the_spare_worker_gets_the_stage_of_a_killed_one(tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "cluster") as cluster:
        agent = cluster.start_agent("ann", spare=True)
        cluster.wait_for_agents()
        with cluster.serve(endless_model(tmp_path / "llama"), "--context", "256") as server:
            (spare,) = until(lambda: agent.spare_workers, "a spare worker waits")

            agent.worker.kill()

            until(
                lambda: [worker.pid for worker in agent.workers] == [spare.pid],
                "the spare worker has the stage",
            )
            until(lambda: server.describe().state == "ready", "the model answers again")
            with server.client() as client:
                assert (
                    client.chat("hello", max_tokens=3, temperature=0).usage.completion_tokens == 3
                )
            until(lambda: agent.spare_workers, "there is another spare worker")
    assert not spare.is_running()
