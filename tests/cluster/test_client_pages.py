"""The programs of docs/clients/, run by the libraries that they are for."""

import os
from collections.abc import Iterator

import pytest

from tests.support.cluster import LocalCluster, ServeProgram
from tests.support.deadlines import scaled
from tests.support.pages import ROOT, fenced, run_program

CLIENTS = ROOT / "docs" / "clients"
PAGES = ("openai-python", "anthropic", "ollama", "langchain", "litellm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    with LocalCluster(tmp_path_factory.mktemp("pages")) as cluster:
        cluster.start_agents("ann")
        with cluster.serve("demo", "--nodes", "ann", "--context", "512") as server:
            yield server


@pytest.mark.sweep
@pytest.mark.parametrize("page", PAGES)
def test_programs_of_a_page_get_answers(server: ServeProgram, page: str) -> None:
    """Slow: each program imports its library anew."""
    env = {
        **os.environ,
        "OPENAI_BASE_URL": f"{server.http}/v1",
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_BASE_URL": server.http,
        "ANTHROPIC_API_KEY": "none",
        "OLLAMA_HOST": server.http,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it is fetched
    }
    programs = fenced((CLIENTS / f"{page}.md").read_text("utf-8"), "python")

    assert programs
    for program in programs:
        program = program.replace("http://127.0.0.1:8080", server.http)
        assert run_program(program, env, scaled(120)).strip()
