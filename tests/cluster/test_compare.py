"""Plans for the machines that are there, and what they learn from serving."""

import json
import re
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, Result, endless_model, until


def run(cluster: LocalCluster, *words: str) -> Result:
    """A plan over a cluster starts several processes, each of which imports MLX."""
    return cluster.start(*words).result(deadline=240)


@pytest.mark.sweep
def test_a_served_model_teaches_the_plans_of_its_fleet(tmp_path: Path) -> None:
    """Slow: it serves a model twice, and runs four commands."""
    model = endless_model(tmp_path / "it", num_hidden_layers=8, hidden_size=256)
    asked = (str(model), "--context", "512")
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", "bob", memory="4MB")

        before = run(cluster, "plan", *asked)
        with cluster.serve(*asked) as server, server.client() as client:
            speed = client.chat("hello", max_tokens=32).timings.tokens_per_s
            known = cluster.home / "measured.json"
            until(known.exists, "serve has kept what it measured")
            compared = run(cluster, "plan", "--compare")
        after = json.loads(run(cluster, "plan", *asked, "--json").out)
        with cluster.serve(*asked) as again:
            shown = again.out

    assert "nothing was measured yet" in before.out
    assert before.code == compared.code == 0, compared.err
    assert len(after["stages"]) == 2
    assert "assumed" not in shown  # neither layers nor hops
    assert re.search(r"hops .*, measured", shown)
    # The machine is shared with other programs, so runs differ by themselves, and by much.
    predicted = 1e3 / after["predicted"]["tokens_per_s_single"]
    assert 0.1 < predicted / (1e3 / speed) < 10
    assert re.search(r"together +[\d.]+ +[\d.]+ +[+-]\d+ %", compared.out)


def test_comparing_needs_a_model_that_is_served(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann")

        told = run(cluster, "plan", "--compare")

    assert told.code == 1
    assert "nothing serves" in told.err or "no " in told.err
