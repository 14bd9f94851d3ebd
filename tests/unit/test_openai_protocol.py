"""Requests of OpenAI's APIs as the gateway's messages, and its events as their JSON."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.body import parsed
from coordinator.protocols.asked import Asked
from coordinator.protocols.errors import Failure, HttpError, failure_of
from coordinator.protocols.openai_chat import read_chat
from coordinator.protocols.openai_completions import read_completion
from unicluster.client.answers import collect, event_from_wire
from unicluster.errors import BusyError, InputError, StageError, UnavailableError
from unicluster.v1.chat_pb2 import (
    Delta,
    Finish,
    GenerateEvent,
    GenerateRequest,
    Message,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Asked:
    return read_chat({"messages": HELLO} | fields, "parrot")


def completion(**fields: Any) -> Asked:
    return read_completion({"prompt": "Once"} | fields, "parrot")


def test_every_field_of_a_chat_reaches_the_request() -> None:
    asked = chat(
        model="parrot",
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=-1,
        logit_bias={"7": -100, "8": 2.5},
        stop=["a", "b"],
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=3,
        top_k=40,
        min_p=0.25,
        repetition_penalty=1.5,
    )

    assert asked.request == GenerateRequest(
        model="parrot",
        messages=[Message(role="user", content="hello")],
        max_tokens=9,
        stop=["a", "b"],
        logprobs=3,
        sampling=Sampling(
            temperature=0.5,
            top_p=0.9,
            presence_penalty=1,
            frequency_penalty=-1,
            seed=(1 << 64) - 1,
            logit_bias={7: -100, 8: 2.5},
            top_k=40,
            min_p=0.25,
            repetition_penalty=1.5,
        ),
    )


def test_contents_in_parts_and_the_role_of_developers_are_understood() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = chat(messages=[{"role": "developer", "content": parts}, *HELLO])

    assert asked.request.messages[0] == Message(role="system", content="one\ntwo")


def test_fields_without_effect_are_accepted() -> None:
    asked = chat(
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        n=None,
    )

    assert asked.request == chat().request


REFUSED: dict[str, dict[str, Any]] = {
    "tools[0].function": {"tools": [{"type": "function"}]},
    "tools[0].type": {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
    "tools[0].function.name": {"tools": [{"type": "function", "function": {}}]},
    "tools[0].function.colour": {"tools": [{"function": {"name": "a", "colour": "red"}}]},
    "tool_choice": {"tool_choice": "always"},
    "tool_choice.type": {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
    "functions": {"functions": [{"name": "a"}]},
    "web_search_options": {"web_search_options": {}},
    "audio": {"audio": {}},
    "prediction": {"prediction": {}},
    "response_format.type": {"response_format": {"type": "xml"}},
    "response_format.json_schema": {"response_format": {"type": "json_schema"}},
    "response_format.regex": {"response_format": {"type": "regex"}},
    "messages[0].tool_calls[0].function": {
        "messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]
    },
    "modalities": {"modalities": ["text", "audio"]},
    "reasoning_effort": {"reasoning_effort": 3},
    "store": {"store": True},
    "service_tier": {"service_tier": "flex"},
    "nonsense": {"nonsense": 0},
    "n": {"n": 17},
    "temperature": {"temperature": "hot"},
    "top_p": {"top_p": True},
    "seed": {"seed": 1.5},
    "logit_bias": {"logit_bias": {"one": 1}},
    "logit_bias ": {"logit_bias": {"1": "much"}},
    "stop": {"stop": [1]},
    "stream": {"stream": "yes"},
    "stream_options": {"stream_options": {"include_usage": True}},
    "stream_options.frequency": {"stream": True, "stream_options": {"frequency": 1}},
    "top_logprobs": {"top_logprobs": 2},
    "max_tokens": {"max_tokens": 1, "max_completion_tokens": 2},
    "max_tokens ": {"max_tokens": 0},
    "messages": {"messages": []},
    "messages ": {"messages": "hello"},
    "messages[0]": {"messages": ["hello"]},
    "messages[0].role": {"messages": [{"role": "robot", "content": ""}]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].content ": {"messages": [{"role": "user", "content": "\ud800"}]},
    "messages[0].content[0].type": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    },
    "messages[0].colour": {"messages": [{"role": "user", "content": "", "colour": "red"}]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        chat(**REFUSED[name])
    assert str(caught.value).startswith(f"{name.strip()}: ")
    assert failure_of(caught.value).param == name.strip()


@pytest.mark.parametrize(
    ("field", "value"),
    [("parallel_tool_calls", 1), ("parallel_tool_calls", 0.0), ("store", 0), ("store", 0.0)],
)
def test_numbers_are_not_true_or_false(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        chat(**{field: value})


def test_calls_and_their_results_reach_the_request() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked = chat(
        messages=[
            {"role": "user", "content": "2 + 3?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [called], "reasoning": "Hm."},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ]
    )

    call = ToolCall(id="1", name="add", arguments="{}")
    assert list(asked.request.messages) == [
        Message(role="user", content="2 + 3?", name="ann"),
        Message(role="assistant", tool_calls=[call], reasoning_content="Hm."),
        Message(role="tool", tool_call_id="1", content="5"),
    ]


NOTHING = {"type": "object", "additionalProperties": False}
ADD = {"name": "add", "description": "Adds.", "parameters": NOTHING, "strict": True}


def test_tools_and_the_choice_among_them_reach_the_request() -> None:
    tools = [{"type": "function", "function": ADD}]
    named = {"type": "function", "function": {"name": "add"}}

    request = chat(tools=tools, tool_choice=named, parallel_tool_calls=False).request

    assert list(request.tools) == [
        Tool(name="add", description="Adds.", parameters=json.dumps(NOTHING), strict=True)
    ]
    assert (request.tool_choice.name, request.single_tool_call) == ("add", True)
    assert chat(tools=tools, tool_choice="required").request.tool_choice.required
    assert chat(tools=tools, tool_choice="none").request.tool_choice.none
    assert not chat(tools=tools, tool_choice="auto").request.HasField("tool_choice")
    assert chat(reasoning_effort="low").request.reasoning.effort == "low"
    assert chat(max_reasoning_tokens=64).request.reasoning.most_tokens == 64


def test_calls_are_the_same_in_a_stream_and_in_a_whole_answer() -> None:
    calls = [ToolCall(id=str(n), name="add", arguments=f'{{"a": {n}}}') for n in range(3)]
    deltas = [Delta(text="Well. "), Delta(calls=calls[:2]), Delta(calls=calls[2:])]
    answer = [GenerateEvent(delta=delta) for delta in deltas]
    answer.append(GenerateEvent(finish=Finish(reason="tool_calls", usage=Usage())))
    asked = chat(stream=True)

    whole = asked.reply.whole([collect(map(event_from_wire, answer))])["choices"][0]
    pieces = [chunk["choices"][0] for chunk in stream(asked, answer)]

    assert whole["finish_reason"] == pieces[-1]["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Well. "
    streamed = [call for piece in pieces for call in piece["delta"].get("tool_calls", [])]
    assert [call.pop("index") for call in streamed] == [0, 1, 2]
    assert streamed == whole["message"]["tool_calls"]
    assert streamed[1]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_the_form_of_an_answer_reaches_the_request() -> None:
    properties = {"properties": {"a": {"type": "null"}}, "required": ["a"]}
    schema = {**NOTHING, **properties, "default": None}
    forms: dict[str, Any] = {
        "json_object": {},
        "json_schema": {"json_schema": {"name": "n", "strict": True, "schema": schema}},
        "regex": {"regex": "[ab]+"},
        "grammar": {"grammar": 'start: "a"'},
    }
    for kind, fields in forms.items():
        request = chat(response_format={"type": kind} | fields).request
        assert request.constraint.WhichOneof("kind") == kind
        if kind == "json_schema":
            assert json.loads(request.constraint.json_schema) == schema
    variables = chat(chat_template_kwargs={"enable_thinking": False}).request.template_arguments
    assert json.loads(variables) == {"enable_thinking": False}


def test_a_completion_takes_text_or_token_ids() -> None:
    assert completion().request == GenerateRequest(prompt="Once", max_tokens=16)
    assert completion(prompt=[1, 2]).request.token_ids == [1, 2]
    assert completion(prompt=[[1, 2]]).request.token_ids == [1, 2]
    assert completion(prompt=["Once"], logprobs=0).request.logprobs == 0
    for name, value in {
        "prompt": ["a", "b"],
        "suffix": "end",
        "echo": True,
        "best_of": 2,
        "logprobs": 21,
    }.items():
        with pytest.raises(InputError, match=f"^{name}: "):
            completion(**{name: value})


def test_each_of_several_answers_has_a_seed_of_its_own() -> None:
    requests = chat(n=3, seed=5).requests()
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    assert not any(request.sampling.HasField("seed") for request in chat(n=3).requests())


def events(*texts: str, reasoning: str = "") -> list[GenerateEvent]:
    logprob = TokenLogprob(token_id=1, logprob=-0.5, text=b"\xf0", top=[TokenLogprob(text=b"a")])
    deltas = [GenerateEvent(delta=Delta(text=text, logprobs=[logprob])) for text in texts]
    if reasoning:
        deltas.insert(0, GenerateEvent(delta=Delta(reasoning=reasoning, token_ids=[5, 6])))
    usage = Usage(prompt_tokens=5, completion_tokens=len(texts), cached_tokens=4)
    return [*deltas, GenerateEvent(finish=Finish(reason="stop", usage=usage))]


def stream(asked: Asked, *answers: list[GenerateEvent]) -> list[Any]:
    """The values of all `data:` lines."""
    reply = asked.reply
    parts = [reply.begin()]
    parts += [reply.event(index, each) for index, answer in enumerate(answers) for each in answer]
    lines = b"".join([*parts, reply.end()]).decode().split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_and_a_whole_answer_say_the_same() -> None:
    answers = events("Eight", ".", reasoning="Spiders..."), events("8")
    asked = chat(n=2, stream=True, stream_options={"include_usage": True}, logprobs=True)

    whole = asked.reply.whole([collect(map(event_from_wire, answer)) for answer in answers])
    chunks = stream(asked, *answers)

    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"]]
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        for name in ("content", "reasoning_content"):
            text = "".join(piece["delta"].get(name, "") for piece in mine)
            assert text == choice["message"].get(name, "")
        entries = [e for piece in mine if piece["logprobs"] for e in piece["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
    assert whole["usage"] == chunks[-1]["usage"]
    assert whole["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    (first, *_) = whole["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["top_logprobs"][0]["token"]) == (
        "\ufffd",
        [0xF0],
        "a",
    )


def test_a_completion_in_pieces_is_the_whole_one() -> None:
    answer = events("Eight", ".")
    asked = completion(stream=True, logprobs=1)

    whole = asked.reply.whole([collect(map(event_from_wire, answer))])
    chunks = stream(completion(stream=True, logprobs=1), answer)

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Eight."
    assert whole["choices"][0]["text"] == "Eight."
    assert whole["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [1]


ERRORS = [
    (InputError("seed: no"), 400, "seed", None),
    (BusyError("full"), 429, None, "1"),
    (UnavailableError("loading"), 503, None, "5"),
    (StageError("ann failed"), 500, None, None),
    (HttpError(401, "no"), 401, None, None),
    (ValueError("a secret"), 500, None, None),
]


@pytest.mark.parametrize(("error", "status", "param", "retry"), ERRORS)
def test_errors_have_the_status_that_clients_expect(
    error: Exception, status: int, param: str | None, retry: str | None
) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.param) == (status, param)
    assert failure.headers.get("Retry-After") == retry
    assert "secret" not in failure.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"1" * 10_000, b'{"a": 1}}']
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parsed(body)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = [*chat().request.DESCRIPTOR.fields_by_name, *(name.split(".")[0] for name in REFUSED)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([read_chat, read_completion]),
    st.dictionaries(st.sampled_from([name.strip() for name in NAMES]) | st.text(), JSON),
    st.booleans(),
)
def test_any_json_is_a_request_or_a_refusal(read: Any, fields: dict[str, Any], whole: bool) -> None:
    body = {"messages": HELLO} | fields if whole else fields
    try:
        asked = read(body, "parrot")
    except InputError as error:
        failure = failure_of(error)
        assert isinstance(failure, Failure)
        assert failure.status == 400
        assert failure.message.isprintable() or "\\" in failure.message
    else:
        assert asked.request.IsInitialized()
