"""The HTTP door over real connections; its head does what the prompt says."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.api import body, responding, server
from tests.support import cluster
from tests.support.deadlines import scaled
from tests.support.http_door import Door, http_door
from unicluster.cluster.sizes import CHAT_BYTES

CHAT = "/v1/chat/completions"
DEADLINE = 10.0


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with http_door(hosts=["studio.example"], origins=["https://chat.example"]) as door:
        yield door


@pytest.fixture
async def http(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as client:
        yield client


@pytest.fixture
async def ask(door: Door) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{door.url}/v1", api_key="none", max_retries=0, timeout=scaled(DEADLINE)
    ) as client:
        yield client


def said(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]} | fields


async def until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    await asyncio.to_thread(cluster.until, condition, what, seconds)


async def test_an_answer_whole_and_in_pieces(ask: openai.AsyncOpenAI) -> None:
    whole = await ask.chat.completions.create(model="parrot", **said("hello there"))
    stream = await ask.chat.completions.create(model="parrot", stream=True, **said("hello there"))
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert whole.choices[0].message.content == "You said: hello there"
    assert "".join(pieces) == "You said: hello there"
    assert len(pieces) > 3


async def test_reasoning_is_apart_from_the_answer(ask: openai.AsyncOpenAI) -> None:
    whole = await ask.chat.completions.create(model="parrot", **said("think"))
    message: Any = whole.choices[0].message

    assert (message.content, message.reasoning_content) == (
        "Eight.",
        "Let me see. A spider...",
    )


REFUSALS = [
    ("INVALID_ARGUMENT seed: no", openai.BadRequestError, "seed: no"),
    ("NOT_FOUND no such model", openai.NotFoundError, "no such model"),
    ("RESOURCE_EXHAUSTED queue full", openai.RateLimitError, "queue full"),
    ("UNAVAILABLE machine ann is gone", openai.InternalServerError, "machine ann is gone"),
    ("INTERNAL it broke", openai.InternalServerError, "it broke"),
]


ANTHROPIC: dict[type[Exception], type[anthropic.APIStatusError]] = {
    openai.BadRequestError: anthropic.BadRequestError,
    openai.NotFoundError: anthropic.NotFoundError,
    openai.RateLimitError: anthropic.RateLimitError,
    openai.InternalServerError: anthropic.InternalServerError,
}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_answer_is_an_error_of_openai(
    ask: openai.AsyncOpenAI, stream: bool
) -> None:
    for refusal, kind, message in REFUSALS:
        request: Any = said(f"refuse {refusal}", model="parrot", stream=stream)
        with pytest.raises(kind, match=message):
            await ask.chat.completions.create(**request)


RENAMED = [
    (CHAT, {}, "reasoning.effort: must be", "reasoning_effort"),
    (CHAT, {}, "constraint.json_schema: no", "response_format.json_schema.schema"),
    (CHAT, {}, "constraint.json_object: no", "response_format"),
    (CHAT, {"max_completion_tokens": 9}, "max_tokens: the context", "max_completion_tokens"),
    (CHAT, {"max_tokens": 9}, "max_tokens: the context", "max_tokens"),
    (CHAT, {}, "template_arguments: no", "chat_template_kwargs"),
    (CHAT, {}, "messages: the prompt has", "messages"),
    ("/v1/responses", {}, "reasoning.effort: must be", "reasoning.effort"),
    ("/v1/responses", {}, "max_tokens: the context", "max_output_tokens"),
    ("/v1/responses", {}, "messages: the prompt has", "input"),
    ("/v1/messages", {"max_tokens": 9}, "stop: no", "stop_sequences"),
    ("/v1/messages", {"max_tokens": 9}, "reasoning.most_tokens: no", "thinking.budget_tokens"),
    ("/api/chat", {}, "repetition_penalty: must be", "options.repeat_penalty"),
    ("/api/chat", {}, "reasoning.effort: must be", "think"),
    ("/api/generate", {}, "messages: the prompt has", "prompt"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "more", "refusal", "name"), RENAMED)
async def test_an_error_names_the_field_as_its_client_does(
    http: httpx.AsyncClient, path: str, more: dict[str, Any], refusal: str, name: str, stream: bool
) -> None:
    prompt = f"refuse INVALID_ARGUMENT {refusal}"
    asked = {"input": prompt} if path == "/v1/responses" else said(prompt)
    asked = {"prompt": prompt} if path == "/api/generate" else asked
    answer = await http.post(path, json={**asked, **more, "stream": stream})
    error = answer.json()["error"]

    message = error if isinstance(error, str) else error["message"]
    assert answer.status_code == 400
    assert message.startswith(f"{name}: ")
    if path in (CHAT, "/v1/responses"):
        assert error["param"] == name


async def test_an_error_in_mid_stream_is_an_event_and_the_end(
    ask: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    stream = await ask.chat.completions.create(
        model="parrot", stream=True, **said("break UNAVAILABLE machine ann is gone")
    )
    with pytest.raises(openai.APIError, match="machine ann is gone"):
        async for _ in stream:
            pass
    for prompt in ("break UNAVAILABLE machine ann is gone", "end"):
        answer = await http.post(CHAT, json=said(prompt, stream=True))
        *_, last = answer.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


async def test_the_client_of_anthropic_gets_answers_counts_and_errors(door: Door) -> None:
    parrot = "parrot"
    async with anthropic.AsyncAnthropic(
        base_url=door.url, api_key="none", max_retries=0, timeout=scaled(DEADLINE)
    ) as client:
        asks: Any = {"model": parrot, "max_tokens": 9}
        whole = await client.messages.create(**asks, **said("hello there"))
        async with client.messages.stream(
            **asks, thinking={"type": "enabled", "budget_tokens": 1024}, **said("think")
        ) as stream:
            streamed = await stream.get_final_message()
        counted = await client.messages.count_tokens(model=parrot, **said("one two three"))
        for refusal, kind, message in REFUSALS[:4]:
            with pytest.raises(ANTHROPIC[kind], match=message):
                await client.messages.create(**asks, **said(f"refuse {refusal}"))
        with pytest.raises(anthropic.APIStatusError, match="machine ann is gone"):
            async with client.messages.stream(
                **asks, **said("break UNAVAILABLE machine ann is gone")
            ) as stream:
                await stream.get_final_message()

    assert [block.text for block in whole.content if block.type == "text"] == [
        "You said: hello there"
    ]
    thought, answer = streamed.content
    assert thought.type == "thinking"
    assert answer.type == "text"
    assert (thought.thinking, answer.text) == ("Let me see. A spider...", "Eight.")
    assert counted.input_tokens == 3


async def test_responses_whole_and_streamed(ask: openai.AsyncOpenAI) -> None:
    whole = await ask.responses.create(model="parrot", input="hello there")
    async with ask.responses.stream(model="parrot", input="think") as stream:
        streamed = await stream.get_final_response()
    with pytest.raises(openai.RateLimitError):
        await ask.responses.create(model="parrot", input="refuse RESOURCE_EXHAUSTED full")
    broken = await ask.responses.create(
        model="parrot", input="break UNAVAILABLE machine ann is gone", stream=True
    )
    events: list[Any] = [event async for event in broken]
    last = events[-1]

    assert last.type == "error"
    assert "machine ann is gone" in last.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert whole.output_text == "You said: hello there"
    assert streamed.output_text == "Eight."
    assert [item.type for item in streamed.output] == ["reasoning", "message"]


async def test_the_client_of_ollama_chats_generates_and_lists(door: Door) -> None:
    client = ollama.AsyncClient(host=door.url, timeout=scaled(DEADLINE))
    asks: Any = {"model": "parrot:latest", "options": {"num_ctx": 4096}, "keep_alive": -1}
    whole = await client.chat(**asks, **said("hello there"))
    pieces = [part async for part in await client.chat(**asks, **said("think"), stream=True)]
    hidden = await client.chat(**asks, **said("think"), think=False)
    generated = await client.generate(**asks, prompt="hello there", system="Be brief.")
    (listed,) = (await client.list()).models
    (running,) = (await client.ps()).models
    shown = await client.show("parrot")

    assert whole.message.content == generated.response == "You said: hello there"
    assert "".join(part.message.content or "" for part in pieces) == "Eight."
    assert "".join(part.message.thinking or "" for part in pieces) == "Let me see. A spider..."
    assert (hidden.message.content, hidden.message.thinking) == ("Eight.", None)
    assert [part.done for part in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].done_reason, pieces[-1].prompt_eval_count) == ("stop", 5)
    assert listed.model == running.model == "parrot:latest"
    assert shown.capabilities == ["completion", "tools"]
    for prompt, status in (("refuse NOT_FOUND no", 404), ("refuse UNAVAILABLE gone", 503)):
        with pytest.raises(ollama.ResponseError) as caught:
            await client.chat(**asks, **said(prompt))
        assert caught.value.status_code == status
    with pytest.raises(ollama.ResponseError, match="machine ann"):
        async for _ in await client.chat(
            **asks, **said("break UNAVAILABLE machine ann is gone"), stream=True
        ):
            pass
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        await client.chat(model="parrot", options={"num_ctx": 5000}, **said("hello"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
async def test_who_loads_a_model_as_of_ollama_hears_that_it_is(
    door: Door, http: httpx.AsyncClient, path: str, stream: bool
) -> None:
    loaded = await http.post(path, json={"model": "parrot:latest", "stream": stream})
    other = await http.post(path, json={"model": "owl", "stream": stream})
    door.service.state = "loading"
    early = await http.post(path, json={"model": "parrot", "stream": stream})

    assert (loaded.json()["done"], loaded.json()["done_reason"]) == (True, "load")
    assert other.status_code == 404
    assert (early.status_code, early.json()["progress"]) == (503, 0.25)


async def test_what_a_model_can_do_is_not_said_before_it_is_known(
    door: Door, http: httpx.AsyncClient
) -> None:
    door.service.state = "loading"
    early = await http.post("/api/show", json={"model": "parrot"})
    assert early.json()["capabilities"] == ["completion"]


async def test_while_the_model_loads_the_reason_is_said(
    door: Door, http: httpx.AsyncClient
) -> None:
    door.service.state = "loading"
    answer = await http.post(CHAT, json=said("hello"))
    ready = await http.get("/readyz")
    door.service.state = "ready"

    assert answer.status_code == ready.status_code == 503
    assert answer.headers["retry-after"] == ready.headers["retry-after"] == "5"
    assert "3 of 12 GB" in answer.json()["error"]["message"]
    assert "3 of 12 GB" in ready.json()["reason"]
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200


ASKED = [
    (CHAT, said("hello"), ("error",)),
    ("/v1/completions", {"prompt": "hello"}, ("error",)),
    ("/v1/responses", {"input": "hello"}, ("error",)),
    ("/v1/messages", said("hello", max_tokens=9), ("error",)),
    ("/v1/messages/count_tokens", said("hello"), ("error",)),
    ("/api/chat", said("hello"), ()),
    ("/api/generate", {"prompt": "hello"}, ()),
]


@pytest.mark.parametrize(("path", "body", "within"), ASKED, ids=lambda each: str(each)[:25])
@pytest.mark.parametrize("state", ["loading", "recovering", "failed"])
async def test_each_protocol_says_how_far_the_model_is(
    door: Door, http: httpx.AsyncClient, path: str, body: Any, within: tuple[str, ...], state: str
) -> None:
    door.service.state = state
    answer = await http.post(path, json=body)

    said = answer.json()
    for name in within:
        said = said[name]
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert (said["state"], said["reason"], said["progress"]) == (
        *(state, "3 of 12 GB are loaded", 0.25),
    )


async def test_an_answer_that_a_loss_ends_says_how_the_model_is(
    door: Door, http: httpx.AsyncClient
) -> None:
    """In its stream, too, whose status was 200."""
    body = said("break UNAVAILABLE machine ann is gone", stream=True)
    answer = await http.post(CHAT, json=body)
    *_, last = (line for line in answer.text.splitlines() if line.startswith("data: "))

    error = json.loads(last.removeprefix("data: "))["error"]
    assert answer.status_code == 200
    assert error["state"] == door.service.state
    assert "ann" in error["reason"]
    assert error["progress"] is None


async def test_what_is_wrong_with_a_request_says_nothing_of_the_model(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(CHAT, json=said("hello", seed="x"))

    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_metrics_are_those_of_prometheus(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics")
    families = {family.name for family in text_string_to_metric_families(answer.text)}

    assert families
    assert all(name.startswith("unicluster_") for name in families)


async def test_before_anything_is_known_of_the_model_it_is_loading(
    door: Door, http: httpx.AsyncClient
) -> None:
    door.gateway.service = None
    models = await http.get("/v1/models")
    answer = await http.post(CHAT, json=said("hello"))

    assert [(m["id"], m["state"]) for m in models.json()["data"]] == [("parrot", "loading")]
    assert answer.status_code == 503


async def test_the_model_is_listed_with_its_context(ask: openai.AsyncOpenAI) -> None:
    (listed,) = (await ask.models.list()).data
    one: Any = await ask.models.retrieve("parrot")

    assert listed == one
    assert (one.context_length, one.quantization, one.state) == (4096, "q4", "ready")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served"):
        await ask.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served"):
        await ask.chat.completions.create(model="gpt", **said("hello"))


@pytest.mark.parametrize("prompt", ["hold", "silence"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_ends_when_its_client_leaves(door: Door, prompt: str, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=said(prompt, stream=stream, n=3)))
        await until(lambda: door.head.live == 3, "three answers run")
        asking.cancel()
    await until(lambda: door.head.live == 0, "no answer runs", seconds=1.0)
    assert door.gateway.running == 0


async def test_of_several_answers_none_goes_on_after_one_has_failed(
    door: Door, http: httpx.AsyncClient
) -> None:
    calls = 0
    generate = door.head._answer

    async def fails_at_second(request: Any, context: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            request.messages[-1].content = "refuse RESOURCE_EXHAUSTED full"
        async for event in generate(request, context):
            yield event

    door.head._answer = fails_at_second  # type: ignore[method-assign]
    answer = await http.post(CHAT, json=said("silence", n=3))

    assert answer.status_code == 429
    await until(lambda: door.head.live == 0, "no answer runs")


async def test_comments_keep_a_long_prefill_alive(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responding, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(responding, "KEEP_ALIVE_SECONDS", 0.05)
    async with (
        httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as client,
        client.stream("POST", CHAT, json=said("silence", stream=True)) as answer,
    ):
        comments = 0
        async for line in answer.aiter_lines():
            comments += line.startswith(":")
            if comments == 3:
                break
    assert comments == 3


async def test_who_reads_nothing_does_not_hold_an_answer_for_ever(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responding, "SEND_SECONDS", 0.2)
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    data = json.dumps(said("long", stream=True, n=16)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await reader.readline()
    await until(lambda: door.head.live == 0 and door.gateway.running == 0, "it is given up", 20)
    writer.close()


async def raw(door: Door, data: bytes) -> bytes:
    """Bytes that come back for others, until the door hangs up."""
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        async with asyncio.timeout(scaled(DEADLINE)):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("data", [b"", b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: "])
async def test_who_says_nothing_more_is_hung_up_on(
    door: Door, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
    assert await raw(door, data) == b""


async def test_a_body_that_does_not_come_is_not_waited_for(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.1)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{{"
    assert b"HTTP/1.1 408" in await raw(door, head.encode())


async def test_a_body_is_bounded_before_it_is_parsed(door: Door, http: httpx.AsyncClient) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {CHAT_BYTES + 1}\r\n\r\n"
    assert b"HTTP/1.1 413" in await raw(door, head.encode())

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(CHAT_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    answer = await http.post(CHAT, content=pieces())
    assert answer.status_code == 413


BROKEN: list[tuple[int, dict[str, Any]]] = [
    (400, {"content": b"{"}),
    (400, {"content": b"[]"}),
    (400, {"content": b"\x1f\x8b"}),
    (415, {"content": b"{}", "headers": {"Content-Encoding": "gzip"}}),
    (421, {"json": said("hello"), "headers": {"Host": "evil.example"}}),
    (421, {"json": said("hello"), "headers": {"Host": "evil.example:8080"}}),
    (421, {"json": said("hello"), "headers": {"Host": "["}}),
    (403, {"json": said("hello"), "headers": {"Origin": "https://evil.example"}}),
    (403, {"json": said("hello"), "headers": {"Origin": "null"}}),
    (
        415,
        {
            "content": json.dumps(said("hello")),
            "headers": {"Content-Type": "text/plain", "Origin": "https://chat.example"},
        },
    ),
    (200, {"json": said("hello"), "headers": {"Host": "studio.example:8080"}}),
    (200, {"json": said("hello"), "headers": {"Host": "localhost"}}),
    (200, {"json": said("hello"), "headers": {"Host": "[::1]:8080"}}),
    (200, {"json": said("hello"), "headers": {"Origin": "https://chat.example"}}),
    (200, {"content": json.dumps(said("hello")), "headers": {"Content-Type": "text/plain"}}),
]


async def test_who_asks_and_how_is_checked(http: httpx.AsyncClient) -> None:
    answers = [(each, await http.post(CHAT, **each)) for _, each in BROKEN]

    assert [(a.status_code, each) for each, a in answers] == BROKEN
    assert all(a.json()["error"]["message"] for _, a in answers if a.status_code != 200)


async def test_pages_of_other_sites_may_read_only_what_was_opened(http: httpx.AsyncClient) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    allowed = await http.options(CHAT, headers={"Origin": "https://chat.example"} | asks)
    refused = await http.options(CHAT, headers={"Origin": "https://evil.example"} | asks)

    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in refused.headers


async def test_other_paths_methods_and_protocols_are_errors_of_openai(
    http: httpx.AsyncClient,
) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    answers = [
        (404, await http.get("/v1/nothing")),
        (405, await http.get(CHAT)),
        (404, await http.get("/ws", headers=upgrade)),
    ]
    for status, answer in answers:
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_many_answers_at_once_do_not_mix(ask: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> bool:
        stream = await ask.chat.completions.create(
            model="parrot", stream=True, **said(f"number {number}")
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        return text == f"You said: number {number}"

    assert all(await asyncio.gather(*map(one, range(64))))


async def test_the_door_closes_although_an_answer_runs() -> None:
    async with httpx.AsyncClient(timeout=scaled(DEADLINE)) as client:
        async with http_door() as door:
            url = door.url + CHAT
            asking = asyncio.create_task(client.post(url, json=said("hold", stream=True)))
            await until(lambda: door.head.live == 1, "an answer runs")
        with pytest.raises(httpx.HTTPError):
            await asking
    await until(lambda: door.head.live == 0, "the head computes nothing")


async def test_embeddings_are_refused_with_what_to_do(
    door: Door, ask: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    with pytest.raises(openai.BadRequestError, match="parrot makes no embeddings"):
        await ask.embeddings.create(model="parrot", input="hello")
    client = ollama.AsyncClient(host=door.url)
    with pytest.raises(ollama.ResponseError, match="parrot makes no embeddings"):
        await client.embed(model="parrot", input="hello")
    refused = await http.post("/api/embeddings", json={"model": "parrot", "prompt": "hello"})
    assert (refused.status_code, list(refused.json())) == (400, ["error"])
