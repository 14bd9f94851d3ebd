"""A cluster whose certificates live for seconds serves for longer, and cuts no answer."""

import os
import time
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, endless_model, until
from unicluster import Client
from unicluster.errors import UnavailableError
from unicluster.trust.identity import LIFETIME_VARIABLE

LIFETIME_SECONDS = "10"
# Five minutes: UNICLUSTER_TEST_SECONDS=300.
RUN_SECONDS = float(os.environ.get("UNICLUSTER_TEST_SECONDS", "25"))


def answered(client: Client) -> str:
    """How an answer ended; empty while the model is recovering."""
    try:
        return client.chat("hello", max_tokens=32).finish_reason
    except UnavailableError:
        return ""


@pytest.mark.sweep
@pytest.mark.timeout(RUN_SECONDS + 240)
def test_a_cluster_outlives_its_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers over one client and over new ones; a worker killed late is connected to anew."""
    monkeypatch.setenv(LIFETIME_VARIABLE, LIFETIME_SECONDS)
    model = endless_model(tmp_path / "model")
    ended: list[str] = []
    with LocalCluster(tmp_path / "cluster", **{LIFETIME_VARIABLE: LIFETIME_SECONDS}) as cluster:
        cluster.start_agents("ann", "bob", "cat", memory=1_100_000)
        began = time.monotonic()
        with (
            cluster.serve(model, "--context", "512", "--nodes", "ann,bob,cat") as server,
            server.client() as lasting,
        ):
            while time.monotonic() < began + RUN_SECONDS:
                for _ in range(5):
                    ended.append(lasting.chat("hello", max_tokens=32).finish_reason)
                with server.client() as fresh:
                    ended.append(fresh.chat("hello", max_tokens=32).finish_reason)
            workers = cluster.workers()
            workers[-1].kill()  # its agent starts another, which all connect to anew
            ended.append(until(lambda: answered(lasting), "an answer after the worker's end"))
            listed = cluster.run("nodes").out
    print(f"{len(ended)} answers in {time.monotonic() - began:.0f} s")

    assert len(workers) > 1
    assert set(ended) == {"length"}
    assert "ann" in listed
    assert "bob" in listed
