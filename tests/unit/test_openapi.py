"""The OpenAPI document against what reads requests and writes answers: neither may drift."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from starlette.applications import Starlette

from coordinator.api.app import make_app
from coordinator.openapi.document import PATHS, Path, document
from coordinator.protocols.anthropic import read_count, read_message
from coordinator.protocols.errors import Failure, NotReady
from coordinator.protocols.fields import Fields
from coordinator.protocols.ollama import read_chat as read_ollama_chat
from coordinator.protocols.ollama import read_generate
from coordinator.protocols.openai_chat import read_chat
from coordinator.protocols.openai_completions import read_completion
from coordinator.protocols.openai_responses import read_response
from node.generation.sampling import Sampling
from tests.support.bodies import Bodies, damaged
from tests.support.deadlines import scaled
from tests.support.http_door import http_door
from unicluster.chat_limits import check_limits
from unicluster.client.answers import collect, event_from_wire
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import (
    Delta,
    Finish,
    GenerateEvent,
    GenerateRequest,
    TokenLogprob,
    ToolCall,
    Usage,
)

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
READERS: dict[str, Callable[[Any], GenerateRequest]] = {
    "/v1/chat/completions": lambda body: read_chat(body, "parrot").request,
    "/v1/completions": lambda body: read_completion(body, "parrot").request,
    "/v1/responses": lambda body: read_response(body, "parrot").request,
    "/v1/messages": lambda body: read_message(body, "parrot").request,
    "/v1/messages/count_tokens": read_count,
    "/api/chat": lambda body: read_ollama_chat(body, "parrot").request,
    "/api/generate": lambda body: read_generate(body, "parrot").request,
}
# Rules across fields, which a schema does not express.
ACROSS = re.compile(
    "only with|differ|must be n|not with raw|last one must be|tools to call|no tool |"
    "strict, so|two of them|says nothing|they go with messages|empty string|parallel|"
    "not unloaded"
)
BODIES = Bodies(SCHEMAS)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **DOCUMENT})


def body_of(path: str) -> str:
    """The name of the schema of the requests to `path`."""
    return next(each.body for each in PATHS if each.name == path)


def try_bodies(strategy: st.SearchStrategy[Any], count: int, test: Callable[[Any], None]) -> None:
    """Runs a test of `count` bodies, the same ones each time."""

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a failure is found again: no time goes into shrinking it
        suppress_health_check=list(HealthCheck),
    )
    @given(body=strategy)
    def each(body: Any) -> None:
        test(json.loads(json.dumps(body)))

    each()


def read(path: str, body: Any) -> None:
    """Reads a body; its request is checked as by the gateway, its sampling as by a head."""
    request = READERS[path](body)
    check_limits(request)
    Sampling().updated(request.sampling)


def refusal(reading: Callable[[], object]) -> str:
    """Why a body is refused, but for rules across fields; empty where it is not."""
    try:
        reading()
    except InputError as error:
        return "" if ACROSS.search(str(error)) else str(error)
    return ""


COUNTS = [20, pytest.param(400, marks=pytest.mark.sweep)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("path", READERS)
def test_bodies_of_the_document_are_understood(path: str, count: int) -> None:
    def understood(body: Any) -> None:
        assert not refusal(lambda: read(path, body)), body

    try_bodies(BODIES.matching(SCHEMAS[body_of(path)]), count, understood)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("path", READERS)
def test_bodies_against_the_document_are_refused(path: str, count: int) -> None:
    checks = validator(body_of(path))

    def refused(body: Any) -> None:
        assume(not checks.is_valid(body))
        with pytest.raises(InputError):
            read(path, body)

    try_bodies(damaged(BODIES.matching(SCHEMAS[body_of(path)])), count, refused)


@pytest.mark.parametrize("path", READERS)
def test_each_field_that_is_read_is_in_the_document(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    take = Fields.take

    def taking(fields: Fields, name: str) -> Any:
        seen.add(re.sub(r"\[\d+\]", "[]", fields.path(name)))
        return take(fields, name)

    monkeypatch.setattr(Fields, "take", taking)
    schema = SCHEMAS[body_of(path)]
    for body in BODIES.examples(schema):
        assert not refusal(lambda body=body: READERS[path](body)), body
    free = {"messages[].tool_calls[].function.arguments", "tools[].function.parameters"}
    unknown = seen - set(BODIES.fields(schema)) - free
    assert unknown <= {each for each in seen if "logit_bias." in each}


async def test_the_document_has_every_path_and_is_served() -> None:
    async with http_door() as door, httpx.AsyncClient(base_url=door.url) as http:
        served = (await http.get("/openapi.json")).json()
        app = make_app(door.gateway, None)  # type: ignore[arg-type]
    assert isinstance(app, Starlette)
    paths = {
        str(getattr(route, "path", "")).replace(":path", ""): (
            "post" if "POST" in (getattr(route, "methods", None) or ()) else "get"
        )
        for route in app.routes
    }
    assert served == DOCUMENT
    assert {path: next(iter(each)) for path, each in served["paths"].items()} == paths
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", [path for path in PATHS if path.refuses], ids=lambda p: p.name)
async def test_embeddings_are_refused_as_the_document_has_it(path: Path) -> None:
    async with http_door() as door, httpx.AsyncClient(base_url=door.url) as http:
        answer = await http.post(path.name, json={"model": "parrot", "input": "hello"})
    responses = DOCUMENT["paths"][path.name]["post"]["responses"]
    assert answer.status_code == 400
    assert list(responses) == ["400", "401", "403", "421", "503", "505"]
    validator(path.error).validate(answer.json())


@pytest.mark.parametrize("state", ["ready", "loading"])
async def test_descriptions_of_the_model_are_those_of_the_document(state: str) -> None:
    described = [path for path in PATHS if path.answer and not path.body]
    async with http_door() as door, httpx.AsyncClient(base_url=door.url) as http:
        door.service.state = state
        got = [await http.get(path.name.format(name="parrot")) for path in described]
        shown = await http.post("/api/show", json={"model": "parrot:latest"})
    for path, answer in zip(described, got, strict=True):
        late = path.name == "/readyz" and state == "loading"
        assert answer.status_code == (503 if late else 200)
        validator("NotReady" if late else path.answer).validate(answer.json())
    validator("OllamaShown").validate(shown.json())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
async def test_what_the_server_itself_refuses_is_in_the_document(path: Path) -> None:
    """Before a request is read: its HTTP, its version, its lengths; and too many connections."""
    (operation,) = DOCUMENT["paths"][path.name].values()
    (method,) = DOCUMENT["paths"][path.name]
    target = f"{method.upper()} {path.name.format(name='parrot')}"
    asks = {
        f"{target} HTTP/1.1\r\nHost: localhost\r\nnonsense\r\n\r\n": "text/plain",
        f"{target} HTTP/9.9\r\nHost: localhost\r\n\r\n": "application/json",
        f"{target} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        "Content-Length: 5\r\n\r\n0\r\n\r\n": "application/json",
    }
    async with http_door() as door:
        where = urlsplit(door.url)
        for ask, kind in asks.items():
            status, got, body = await refusal_of(where.hostname or "", where.port or 0, ask)
            content = operation["responses"][status]["content"][kind]
            assert got == kind
            if kind == "application/json":
                Draft202012Validator({**content["schema"], **DOCUMENT}).validate(json.loads(body))
    assert operation["responses"]["503"]["content"]["text/plain"]


async def refusal_of(host: str, port: int, ask: str) -> tuple[str, str, bytes]:
    """Status, media type and body of the answer to these bytes, after which the door hangs up."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(ask.encode())
        async with asyncio.timeout(scaled(30)):
            answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    kind = re.search(rb"(?i)content-type: ([^;\r]+)", head)
    return head.split()[1].decode(), kind[1].decode() if kind else "", body


LIKELY = TokenLogprob(token_id=1, logprob=-0.5, text=b"a", top=[TokenLogprob(logprob=-1)])
EVENTS = [
    GenerateEvent(delta=Delta(reasoning="Let me see.", token_ids=[1])),
    GenerateEvent(delta=Delta(text="Eight", token_ids=[2], logprobs=[LIKELY])),
    GenerateEvent(delta=Delta(calls=[ToolCall(id="call_1", name="add", arguments='{"a": 2}')])),
    GenerateEvent(delta=Delta(text=" legs", token_ids=[2])),
]
FINISHES = [
    Finish(reason=reason, stop_string=stop, usage=Usage(prompt_tokens=5, completion_tokens=3))
    for reason, stop in (("stop", ""), ("stop", "a"), ("length", ""), ("tool_calls", ""))
]
HELLO = [{"role": "user", "content": "hello"}]
ASKED: list[tuple[str, Any]] = [
    ("/v1/chat/completions", lambda: read_chat({"messages": HELLO, "logprobs": True}, "parrot")),
    (
        "/v1/chat/completions",
        lambda: read_chat(
            {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}, "parrot"
        ),
    ),
    ("/v1/completions", lambda: read_completion({"prompt": "Once", "logprobs": 1}, "parrot")),
    ("/v1/responses", lambda: read_response({"input": "hello", "temperature": 1}, "parrot")),
    (
        "/v1/messages",
        lambda: read_message(
            {"messages": HELLO, "max_tokens": 9, "thinking": {"type": "enabled"}}, "parrot"
        ),
    ),
    ("/api/chat", lambda: read_ollama_chat({"messages": HELLO}, "parrot")),
    ("/api/generate", lambda: read_generate({"prompt": "hello"}, "parrot")),
]


@pytest.mark.parametrize("finish", FINISHES, ids=lambda finish: finish.reason)
@pytest.mark.parametrize(("path", "ask"), ASKED)
def test_answers_and_events_are_those_of_the_document(
    path: str, ask: Callable[[], Any], finish: Finish
) -> None:
    (entry,) = (each for each in PATHS if each.name == path)
    events = [*EVENTS, GenerateEvent(finish=finish)]
    whole = ask().reply.whole([collect([event_from_wire(event) for event in events])])
    reply = ask().reply
    pieces = [reply.begin(), reply.waiting, *(reply.event(0, each) for each in events)]
    gone = Failure(503, "server_error", "gone")
    late = replace(gone, not_ready=NotReady("loading", "2 of 3 GB are there", 0.667))
    pieces += [reply.end(), reply.failed(gone), reply.failed(late)]

    validator(entry.answer).validate(whole)
    values = [value for piece in pieces for value in values_of(piece)]
    assert len(values) > len(EVENTS)
    for value in values:
        validator(entry.piece).validate(value)


def values_of(piece: bytes) -> Iterator[Any]:
    """JSON values of the events or lines in a part of a stream."""
    for line in piece.decode().splitlines():
        data = line.removeprefix("data: ")
        if data.startswith("{"):
            yield json.loads(data)
