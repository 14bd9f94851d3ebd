"""`serve FILE.gguf`: a cluster of ggml stages answers as the whole model does."""

from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from tests.support.cluster import LocalCluster
from tests.support.tiny_gguf import write_gguf

# Three processes start, each of which imports much.
START_DEADLINE = 300.0


@pytest.fixture
def cluster(tmp_path: Path) -> LocalCluster:
    return LocalCluster(tmp_path / "cluster", HF_HOME=str(tmp_path / "hf"))


def test_two_machines_answer_from_a_split_file_as_one_does_from_a_whole(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    part = write_gguf(tmp_path / "split" / "tiny.gguf", parts=3)
    options = {"temperature": 0, "max_tokens": 12}
    with cluster:
        cluster.start_agents("ann", "bob", memory="1.2MB")
        cluster.start_agents("big", memory="4MB")
        context = ("--context", "256", "--users", "2", "--nodes", "ann,bob")
        server = cluster.serve(part, *context)
        server.wait_for("Ctrl-C unloads", START_DEADLINE)
        with server, server.client() as client:
            stages = [(s.first_layer, s.end_layer) for s in client.describe().stages]
            cut = client.chat("hello", **options)
            again = client.chat("hello", **options)
        server = cluster.serve(file, "--context", "256", "--nodes", "big")
        server.wait_for("Ctrl-C unloads", START_DEADLINE)
        with server, server.client() as client:
            whole = client.chat("hello", **options)
            assert len(client.describe().stages) == 1

    assert stages == [(0, 3), (3, 6)]
    assert cut.text == again.text == whole.text


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cluster: LocalCluster) -> None:
    file = tmp_path / "odd.gguf"
    file.write_bytes(b"nothing of use")
    with cluster:
        cluster.start_agents("ann")
        result = cluster.serve(file).result(START_DEADLINE)

    assert result.code == 2
    assert "odd.gguf: damaged GGUF: it is no GGUF file" in result.err
