"""Caches of prompts on the disks of a whole cluster, all of which is restarted."""

from pathlib import Path

import pytest

from node.prefixes.folder import STATE
from tests.support.cluster import LocalCluster, until
from tests.support.prefixes import counted, files_in
from tests.support.tiny import tiny_config, write_model
from unicluster.client.answers import Answer
from unicluster.client.metrics import Metrics

TEXT = "all of this was said before. " * 10
# Of a size that leaves one way to cut the model, however fast each machine seems to be.
AGENTS = {"ann": "1.35MB", "bob": "720KB"}


def asked(
    cluster: LocalCluster, model: Path, *, killed: bool = False
) -> tuple[Answer, Metrics, str]:
    """An answer of a cluster that is started for it and ended, its metrics, and its status.

    killed: all of it is, as without power, once all machines have written the answer's cache.
    """
    for name, memory in AGENTS.items():
        cluster.start_agent(name, "--cache-dir", str(cluster.folder / name), memory=memory)
    cluster.wait_for_agents()
    with (
        cluster.serve(model, "--cache-disk", "1GB", "--context", "512", "--users", "1") as server,
        server.client() as client,
    ):
        answer = client.chat(TEXT, temperature=0, max_tokens=8)
        metrics = client.measure()
        status = cluster.run("status", "--server", server.address).out
        if killed:
            until(lambda: all(written(cluster.folder / name) for name in AGENTS), "it is on disk")
            for process in [*cluster.workers(), server, *cluster.agents.values()]:
                process.kill()
            cluster.agents.clear()
            return answer, metrics, status
    for name in AGENTS:
        cluster.agents.pop(name).end()
    return answer, metrics, status


def written(directory: Path) -> bool:
    return files_in(directory, STATE) != []


@pytest.mark.sweep
def test_a_prompt_is_on_disk_after_a_restart_of_everything(tmp_path: Path) -> None:
    write_model(model := tmp_path / "tiny", tiny_config("llama"))
    with LocalCluster(tmp_path / "cluster", HF_HOME=str(tmp_path / "hf")) as cluster:
        first, before, _ = asked(cluster, model)
        second, after, status = asked(cluster, model)
        directories = [cluster.folder / stage.machine for stage in after.stages]
        sizes = [counted(directory) for directory in directories]

    assert first.text == second.text
    assert [m.disk_hits for m in (before, after)] == [0, 1]
    cached = second.usage.cached_tokens
    assert first.usage.cached_tokens == 0
    assert cached == after.disk_tokens == second.usage.prompt_tokens - 1
    assert [stage.disk_bytes for stage in after.stages] == sizes
    assert min(sizes) > 0
    assert "1 hit" in status


@pytest.mark.sweep
def test_a_prompt_is_on_disk_after_all_was_killed(tmp_path: Path) -> None:
    write_model(model := tmp_path / "tiny", tiny_config("llama"))
    with LocalCluster(tmp_path / "cluster", HF_HOME=str(tmp_path / "hf")) as cluster:
        first, _, _ = asked(cluster, model, killed=True)
        second, after, _ = asked(cluster, model)

    assert first.text == second.text
    assert after.disk_hits == 1
    assert second.usage.cached_tokens == second.usage.prompt_tokens - 1
