"""Plans for the machines that are there, and what they learn from serving."""

import json
import re
from pathlib import Path

from tests.cluster import LocalCluster, endless_model


def test_a_served_model_teaches_the_plans_of_its_fleet(tmp_path: Path) -> None:
    """Slow: it serves a model, and runs six commands."""
    model = endless_model(tmp_path / "it", num_hidden_layers=8, hidden_size=256)
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann", "bob", memory="9MB")
        asked = (str(model), "--context", "512")

        before = cluster.run("plan", *asked)
        with cluster.serve(*asked):
            compared = cluster.run("plan", "--compare")
            again = cluster.run("plan", "--compare")
        after = json.loads(cluster.run("plan", *asked, "--json").out)
        shown = cluster.run("plan", *asked).out

    assert "nothing was measured yet" in before.out
    assert compared.code == 0, compared.err
    measured = re.search(r"together +([\d.]+) +([\d.]+)", again.out)
    assert measured is not None
    assert "assumed" not in shown
    computed = sum(stage["ms_per_token"] for stage in after["stages"])
    # The machine is shared with other programs, so runs differ by themselves.
    assert 0.5 < computed / float(measured[2]) < 1.5


def test_comparing_needs_a_model_that_is_served(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann")

        told = cluster.run("plan", "--compare")

    assert told.code == 1
    assert "nothing serves" in told.err or "no " in told.err
