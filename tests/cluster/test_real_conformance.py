"""The libraries that people have against SmolLM2-135M-Instruct, over two machines, by ggml.

The tests are those of the demo model, but for the ones that need answers without end.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jsonschema import validate

from tests.cluster.test_conformance import (
    ask,
    client,
    cluster,
    keys,
    one_of,
    test_a_refusal_is_the_error_that_the_library_has_for_it,
    test_a_required_call_has_arguments_of_its_schema,
    test_a_time_limit_of_the_client_ends_the_answer,
    test_an_answer_and_its_stream_are_those_of_grpc,
    test_an_answer_has_the_form_of_a_schema,
    test_requests_of_mlx_lm_s_own_tests_are_answered,
    test_tools_and_their_results_reach_the_prompt_of_ollama,
    test_who_leaves_a_stream_ends_the_answer,
)
from tests.support.api_clients import CLIENTS, POINT, said
from tests.support.cluster import LocalCluster, ServeProgram
from tests.support.real_model import MISSING, gguf_file, gguf_with_tools

__all__ = [
    "ask",
    "client",
    "cluster",
    "keys",
    "test_a_refusal_is_the_error_that_the_library_has_for_it",
    "test_a_required_call_has_arguments_of_its_schema",
    "test_a_time_limit_of_the_client_ends_the_answer",
    "test_an_answer_and_its_stream_are_those_of_grpc",
    "test_an_answer_has_the_form_of_a_schema",
    "test_requests_of_mlx_lm_s_own_tests_are_answered",
    "test_tools_and_their_results_reach_the_prompt_of_ollama",
    "test_who_leaves_a_stream_ends_the_answer",
]

FILE = gguf_file()
pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(FILE is None, reason=MISSING),
]


@pytest.fixture(scope="module")
def memory() -> str:
    """That of a machine: the model needs both."""
    return "300MB"


@pytest.fixture(scope="module")
def server(
    cluster: LocalCluster,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServeProgram]:
    pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")
    assert FILE is not None
    model: Path = gguf_with_tools(FILE, tmp_path_factory.mktemp("models"))
    options = ("--nodes", "ann,bob", "--context", "2048", "--users", "4")
    with cluster.serve(model, *options) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: ServeProgram) -> str:
    with server.client() as grpc:
        return grpc.chat(said("What is 2 + 3?"), temperature=0, max_tokens=8).text


def test_all_libraries_at_once_get_what_they_ask_for(
    server: ServeProgram, keys: dict[str, str]
) -> None:
    asks = [one_of(each, server, keys["all"]) for each in CLIENTS]
    with ThreadPoolExecutor(len(asks)) as pool:
        points = list(pool.map(lambda ask: ask.shaped("Set a point."), asks))
    for point in points:
        validate(point, POINT)
