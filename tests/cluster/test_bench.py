"""`unicluster bench` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster
from tests.support.real_model import gguf_file
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a kind that mlx-lm's own pipeline can cut."""
    config = tiny_config("llama") | {"model_type": "qwen2"}
    return write_model(tmp_path_factory.mktemp("models") / "qwen2", config)


@pytest.mark.sweep
def test_a_model_is_cut_here_and_measured_beside_mlx_lm(tmp_path: Path, model: Path) -> None:
    """Slow: it starts two agents, a server and three processes of mlx-lm."""
    file = tmp_path / "found.json"
    sizes = ("--rounds", "1", "--tokens", "8", "--prompt", "64", "--users", "2")
    with LocalCluster(tmp_path / "cluster") as cluster:
        program = cluster.start("bench", str(model), "--local", "2", *sizes, "--json", str(file))
        result = program.result(deadline=240)

    assert result.code == 0, result.err
    found = json.loads(file.read_text())
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert len(found["stages"]) == 2
    for name in (
        "decode, per token",
        "decode, per token, mlx-lm in one process",
        "decode, per token, mlx-lm's ring of 2",
        "decode, added per hop",
        "2 users, against 1",
        "TTFT, prompt of 64",
        "next turn, against the first",
        "empty hop",
    ):
        assert len(figures[name]["values"]) == 1
    assert "against mlx-lm in one" in result.out


@pytest.mark.sweep
def test_a_gguf_is_measured_beside_llama_cpp(tmp_path: Path) -> None:
    """Slow: it starts two agents, a server and llama.cpp."""
    pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")
    file = tmp_path / "found.json"
    sizes = ("--rounds", "1", "--tokens", "8", "--prompt", "64", "--only", "decode")
    arguments = ("--local", "2", *sizes, "--only", "prefill", "--json", str(file))
    model = gguf_file() or write_gguf(tmp_path / "tiny.gguf")
    with LocalCluster(tmp_path / "cluster") as cluster:
        result = cluster.start("bench", str(model), *arguments).result(deadline=240)

    assert result.code == 0, result.err
    found = json.loads(file.read_text())
    names = {figure["name"] for figure in found["figures"]}
    assert {"decode, per token, llama.cpp in one process", "decode, added per hop"} <= names
    assert len(found["stages"]) == 2
    assert "Not compared" not in result.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["demo"], "give --local N"),
        (["--local", "0"], "--local 0: at least 1"),
        (["--local", "2", "--server", "a:1"], "either --local or --server"),
        (["--local", "2", "owner/name"], "give a directory, a GGUF, or demo"),
        (["--users", "0"], "--users 0: at least 1"),
        (["--speculate", "auto"], "generation options need --local N"),
    ],
)
def test_what_can_t_be_measured_is_refused(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    with LocalCluster(tmp_path) as cluster:
        result = cluster.run("bench", *arguments)

    assert result.code == 2
    assert complaint in result.err
    assert result.err.count("\n") == 1
