"""The libraries that people have, against a real `serve`: one cluster for all of them.

Slow: they take ten seconds to import, and the cluster as many to start.
"""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import ollama
import pytest
from jsonschema import validate

from tests.support.any_requests import try_document
from tests.support.api_clients import CLIENTS, NAME, POINT, TOOL, ApiClient, OllamaChat, said
from tests.support.cluster import LocalCluster, ServeProgram, until
from tests.support.deadlines import scaled
from tests.support.server_cases import CASES, Case
from unicluster.cluster.sizes import CHAT_BYTES

pytestmark = pytest.mark.sweep

DEMO = Path(__file__).parents[2] / "node" / "demo" / "model"
SUM = "What is 2 + 3?"
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate"),
)
# Of an answer that goes on until its client leaves.
LONG = 1900
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + (message.content or '') | trim }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, with a template that has tools, and answers that never end by themselves."""
    path = tmp_path_factory.mktemp("models") / "endless"
    path.mkdir()
    for file in DEMO.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights: Any = mx.load(str(path / "model.safetensors"))
    weights["lm_head.weight"] = mx.array(weights["model.embed_tokens.weight"])
    weights["lm_head.weight"][0] = 0  # of the end token; some other logit is always above that
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    for name, changed in {
        "config.json": {"tie_word_embeddings": False},
        "tokenizer_config.json": {"chat_template": TEMPLATE, "tool_parser_type": "json_tools"},
    }.items():
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(settings | changed))
    return path


@pytest.fixture(scope="module")
def memory() -> str:
    """That of a machine: the model needs both."""
    return "40MB"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, memory: str) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("conformance")) as cluster:
        cluster.start_agents("ann", "bob", memory=memory)
        yield cluster


@pytest.fixture(scope="module")
def keys(cluster: LocalCluster) -> dict[str, str]:
    """Secrets by name: one for everything, and one that is used up by its first answer."""
    limits = {"all": (), "narrow": ("--tokens-per-minute", "1")}
    return {
        name: cluster.run("key", "create", name, *limit).out.strip()
        for name, limit in limits.items()
    }


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, keys: dict[str, str], model: Path) -> Iterator[ServeProgram]:
    options = ("--nodes", "ann,bob", "--context", "2048", "--users", "4")
    with cluster.serve(model, *options) as server:
        yield server


def one_of(client: type[ApiClient], server: ServeProgram, key: str, **options: Any) -> ApiClient:
    defaults = {"limit_s": scaled(120), "model": name_of(server)}
    return client(server.http, key, **defaults | options)


def name_of(server: ServeProgram) -> str:
    return server.describe().model.split(" ")[0]


@pytest.fixture(params=CLIENTS, ids=lambda client: client.__name__)
def client(request: pytest.FixtureRequest) -> type[ApiClient]:
    kind: type[ApiClient] = request.param
    return kind


@pytest.fixture
def ask(client: type[ApiClient], server: ServeProgram, keys: dict[str, str]) -> ApiClient:
    return one_of(client, server, keys["all"])


@pytest.fixture(scope="module")
def expected(server: ServeProgram) -> str:
    with server.client() as grpc:
        return grpc.chat(SUM, temperature=0, max_tokens=8).text


def at_rest(server: ServeProgram) -> None:
    """Waits until no answer is computed, and no stage has a cache of one."""
    with server.client() as grpc:
        until(lambda: not grpc.describe().live_caches, "the caches of all answers are freed")


def test_an_answer_and_its_stream_are_those_of_grpc(ask: ApiClient, expected: str) -> None:
    pieces = list(ask.stream(SUM))
    assert ask.chat(SUM) == "".join(pieces) == expected
    assert len(pieces) > 2


def test_answers_at_once_do_not_mix(ask: ApiClient, server: ServeProgram) -> None:
    prompts = [f"What is {first} + {second}?" for first in (1, 2, 3) for second in (1, 2, 3)]
    alone = [ask.chat(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: "".join(ask.stream(prompt)), prompts))
    assert together == alone
    assert len(set(alone)) > 3


def test_an_answer_has_the_form_of_a_schema(ask: ApiClient) -> None:
    validate(ask.shaped(SUM), POINT)


def test_a_required_call_has_arguments_of_its_schema(
    client: type[ApiClient], ask: ApiClient
) -> None:
    if client is OllamaChat:
        pytest.skip("its API has no tool_choice")
    call = ask.call(SUM)
    assert call.name == NAME
    validate(call.arguments, POINT)


def test_tools_and_their_results_reach_the_prompt_of_ollama(
    server: ServeProgram, keys: dict[str, str]
) -> None:
    headers = {"Authorization": f"Bearer {keys['all']}"}
    ask = ollama.Client(host=server.http, headers=headers, timeout=scaled(120))
    called: Any = {"function": {"name": NAME, "arguments": {"x": 3, "on": True}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "done", "tool_name": NAME},
    ]
    options: Any = {"num_predict": 4}
    name = name_of(server)
    plain, offered, answered = (
        ask.chat(name, messages, tools=tools, options=options).prompt_eval_count or 0
        for messages, tools in (
            (said(SUM), None),
            (said(SUM), [TOOL]),
            ([*said(SUM), *turns], [TOOL]),
        )
    )
    assert plain < offered < answered


def test_a_refusal_is_the_error_that_the_library_has_for_it(
    client: type[ApiClient], server: ServeProgram, keys: dict[str, str]
) -> None:
    key = keys["all"]
    ask = one_of(client, server, key)
    with pytest.raises(client.errors[400], match="temperature"):
        ask.chat(SUM, temperature=3)
    with pytest.raises(client.errors[400], match="context"):
        ask.chat(SUM, tokens=4000)
    with pytest.raises(client.errors[401], match="not known"):
        one_of(client, server, "wrong").chat(SUM)
    with pytest.raises(client.errors[404], match="is not served"):
        one_of(client, server, key, model="other").chat(SUM)
    with pytest.raises(client.errors[413], match="larger than"):
        ask.chat("x" * CHAT_BYTES)
    # In a stream, too, whose answer has not begun.
    with pytest.raises(client.errors[404], match="is not served"):
        list(one_of(client, server, key, model="other").stream(SUM))


def test_a_key_that_is_used_up_has_to_wait(
    client: type[ApiClient], server: ServeProgram, keys: dict[str, str]
) -> None:
    ask = one_of(client, server, keys["narrow"])

    def until_refused() -> None:
        while True:  # the first ones go through, if a minute has passed since the last
            ask.chat(SUM)

    with pytest.raises(client.errors[429], match="1 tokens a minute"):
        until_refused()


@contextmanager
def halted(cluster: LocalCluster, name: str) -> Iterator[None]:
    """The worker of that machine stands still while the block runs."""
    worker = cluster.agents[name].worker
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


def test_a_time_limit_of_the_client_ends_the_answer(
    client: type[ApiClient], cluster: LocalCluster, server: ServeProgram, keys: dict[str, str]
) -> None:
    hasty = one_of(client, server, keys["all"], limit_s=0.3)
    with halted(cluster, "bob"), pytest.raises(client.timeout):
        hasty.chat(SUM, tokens=LONG)
    at_rest(server)


def test_who_leaves_a_stream_ends_the_answer(ask: ApiClient, server: ServeProgram) -> None:
    pieces: Any = ask.stream(SUM, tokens=LONG)
    assert [next(pieces) for _ in range(3)]
    pieces.close()
    at_rest(server)
    assert ask.chat(SUM)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_requests_of_mlx_lm_s_own_tests_are_answered(
    case: Case, server: ServeProgram, keys: dict[str, str]
) -> None:
    headers = {"Authorization": f"Bearer {keys['all']}"}
    with httpx.Client(base_url=server.http, headers=headers, timeout=scaled(120)) as http:
        case.check(http, name_of(server))


def test_any_request_is_answered_as_the_document_says(
    server: ServeProgram, keys: dict[str, str]
) -> None:
    statuses = try_document(server.http, keys["all"], examples=2, limit_s=scaled(120), paths=PATHS)
    assert statuses.total() >= len(PATHS)
    assert statuses[400]
    at_rest(server)


@contextmanager
def away(cluster: LocalCluster, server: ServeProgram, name: str, memory: str) -> Iterator[None]:
    """That machine has left while the block runs."""
    cluster.agents[name].end()
    with server.client() as grpc:
        until(lambda: grpc.describe().state != "ready", "the model is not served")
        yield
        cluster.start_agents(name, memory=memory)
        until(lambda: grpc.describe().state == "ready", "the model is served again")


def test_while_a_machine_is_missing_all_say_so(
    cluster: LocalCluster, server: ServeProgram, keys: dict[str, str], memory: str
) -> None:
    name = name_of(server)
    with away(cluster, server, "bob", memory):
        for client in CLIENTS:
            with pytest.raises(client.errors[503], match=name):
                one_of(client, server, keys["all"], model=name).chat(SUM)
    for client in CLIENTS:
        assert one_of(client, server, keys["all"]).chat(SUM)
