"""Requests of OpenAI's Responses API as the gateway's messages, and events as theirs."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.protocols.asked import Asked
from coordinator.protocols.openai_responses import read_response
from unicluster.client.answers import collect, event_from_wire
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Delta, Finish, GenerateEvent, Message, ToolCall, Usage

NOTHING = {"type": "object", "additionalProperties": False}
TOOL = {"type": "function", "name": "add", "parameters": NOTHING, "strict": True}


def response(**fields: Any) -> Asked:
    return read_response({"input": "hello"} | fields, "parrot")


def test_items_reach_the_request() -> None:
    called = {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}", "id": "x"}
    asked = response(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "2 + 3?"}]},
            {
                "type": "reasoning",
                "id": "r",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            },
            called,
            called | {"call_id": "2"},
            {"type": "function_call_output", "call_id": "1", "output": "5"},
        ],
        max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "null"}}},
        tools=[TOOL],
        tool_choice={"type": "function", "name": "add"},
        parallel_tool_calls=False,
        reasoning={"effort": "high"},
        store=False,
    )

    request = asked.request
    calls = [ToolCall(id=number, name="add", arguments="{}") for number in ("1", "2")]
    assert list(request.messages) == [
        Message(role="system", content="Be brief."),
        Message(role="user", content="2 + 3?"),
        Message(role="assistant", tool_calls=calls, reasoning_content="Hm."),
        Message(role="tool", tool_call_id="1", content="5"),
    ]
    assert json.loads(request.constraint.json_schema) == {"type": "null"}
    assert (request.max_tokens, request.tool_choice.name) == (9, "add")
    assert request.tools[0].strict
    assert request.reasoning.effort == "high"
    assert request.single_tool_call


REFUSED: dict[str, dict[str, Any]] = {
    "input": {"input": []},
    "input[0].type": {"input": [{"type": "item_reference", "id": "1"}]},
    "input[0].content[0].type": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    "tools[0].type": {"tools": [{"type": "web_search"}]},
    "tool_choice": {"tool_choice": "some"},
    "store": {"store": True},
    "previous_response_id": {"previous_response_id": "resp_1"},
    "conversation": {"conversation": "conv_1"},
    "background": {"background": True},
    "truncation": {"truncation": "auto"},
    "reasoning.summary": {"reasoning": {"summary": "detailed"}},
    "input[1].role": {"input": [{"role": "user", "content": ""}, {"role": "robot"}]},
    "text.format.type": {"text": {"format": {"type": "xml"}}},
    "nonsense": {"nonsense": 1},
}


def test_an_item_whose_type_is_null_is_a_message() -> None:
    asked = response(input=[{"type": None, "role": "user", "content": "hello"}])
    assert list(asked.request.messages) == [Message(role="user", content="hello")]


def test_a_part_of_the_reasoning_is_named_by_its_number() -> None:
    thought = {"type": "reasoning", "content": [{"text": "Hm."}, {}]}
    with pytest.raises(InputError, match=r"^input\[0\].content\[1\].text: missing"):
        response(input=[thought])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        response(**REFUSED[name])
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("reason", "status"), [("tool_calls", "completed"), ("length", "incomplete")]
)
def test_a_stream_builds_the_whole_response(reason: str, status: str) -> None:
    call = ToolCall(id="call_1", name="add", arguments='{"a": 1}')
    usage = Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=4)
    events = [
        GenerateEvent(delta=Delta(reasoning="Hm", token_ids=[1])),
        GenerateEvent(delta=Delta(reasoning=".", token_ids=[2])),
        GenerateEvent(delta=Delta(text="I ")),
        GenerateEvent(delta=Delta(text="add.")),
        GenerateEvent(delta=Delta(calls=[call, call])),
        GenerateEvent(finish=Finish(reason=reason, usage=usage)),
    ]
    whole = response().reply.whole([collect(map(event_from_wire, events))])
    reply = response().reply
    parts = [reply.begin(), *(reply.event(0, event) for event in events), reply.end()]
    frames = b"".join(parts).decode().split("\n\n")
    assert frames.pop() == ""
    values = [json.loads(frame.partition("data: ")[2]) for frame in frames]

    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    last = values[-1]
    assert (last["type"], whole["status"]) == (f"response.{status}", status)
    streamed = last["response"]
    done = [v["item"] for v in values if v["type"] == "response.output_item.done"]
    added = [v["item"]["id"] for v in values if v["type"] == "response.output_item.added"]
    assert streamed["output"] == done
    assert [item["id"] for item in done] == added
    texts = "".join(v["delta"] for v in values if v["type"] == "response.output_text.delta")
    assert texts == done[1]["content"][0]["text"] == "I add."
    for answer in (streamed, whole):
        for item in answer["output"]:
            item.pop("id")
        for name in ("id", "created_at"):
            answer.pop(name)
    assert streamed == whole
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = ["text", "include", "instructions", *(name.split(".")[0] for name in REFUSED)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON))
def test_any_json_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert response(**fields).request.IsInitialized()
