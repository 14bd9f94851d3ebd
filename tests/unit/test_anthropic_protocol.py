"""Requests of Anthropic's API as the gateway's messages, and its events as theirs."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.protocols.anthropic import read_count, read_message
from coordinator.protocols.asked import Asked
from coordinator.protocols.errors import anthropic_error, failure_of
from unicluster.client.answers import collect, event_from_wire
from unicluster.errors import BusyError, InputError, UnavailableError
from unicluster.v1.chat_pb2 import Delta, Finish, GenerateEvent, Message, Reasoning, ToolCall, Usage

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}


def message(**fields: Any) -> Asked:
    return read_message({"max_tokens": 9, "messages": HELLO} | fields, "parrot")


def test_a_conversation_with_calls_reaches_the_request() -> None:
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    asked = message(
        system=[{"type": "text", "text": "Be brief."} | cached],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "2 + 3?"} | cached]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "I add."},
                    {"type": "tool_use", "id": "1", "name": "add", "input": {"a": None}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "5"},
                    {"type": "tool_result", "tool_use_id": "2", "is_error": True, "content": []},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        stop_sequences=["x"],
        temperature=0.5,
        top_k=3,
        metadata={"user_id": "me"},
    )

    call = ToolCall(id="1", name="add", arguments='{"a": null}')
    assert list(asked.request.messages) == [
        Message(role="system", content="Be brief."),
        Message(role="user", content="2 + 3?"),
        Message(role="assistant", content="I add.", tool_calls=[call], reasoning_content="Hm."),
        Message(role="tool", content="5", tool_call_id="1"),
        Message(role="tool", content="Error: ", tool_call_id="2"),
        Message(role="user", content="So?"),
    ]
    assert (asked.request.max_tokens, list(asked.request.stop)) == (9, ["x"])
    assert (asked.request.sampling.temperature, asked.request.sampling.top_k) == (0.5, 3)


@pytest.mark.parametrize("value", [0, False, {}])
def test_no_value_of_another_type_passes_for_an_empty_text(value: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": value}
    with pytest.raises(InputError, match="system: must be"):
        message(system=value)
    with pytest.raises(InputError, match=r"content\[0\].content: must be"):
        message(messages=[{"role": "user", "content": [result]}])
    for empty in ("", [], None):
        assert [each.role for each in message(system=empty).request.messages] == ["user"]


def test_tools_and_their_choice_reach_the_request() -> None:
    named = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    request = message(tools=[TOOL], tool_choice=named).request

    assert (request.tools[0].name, json.loads(request.tools[0].parameters)) == (
        "add",
        {"type": "object"},
    )
    assert request.tool_choice.name == "add"
    assert request.single_tool_call
    assert message(tools=[TOOL], tool_choice={"type": "any"}).request.tool_choice.required
    assert read_count({"messages": HELLO, "tools": [TOOL]}).tools[0].name == "add"


REFUSED: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": None},
    "messages": {"messages": [*HELLO, {"role": "assistant", "content": "The answer is"}]},
    "messages[0].role": {"messages": [{"role": "tool", "content": ""}]},
    "output_config.effort": {"output_config": {"effort": "much"}},
    "context_management.edits[0]": {
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}
    },
    "messages[0].content": {"messages": [{"role": "user", "content": 1}]},
    "messages[0].content[0].type": {
        "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    },
    "tools[0].type": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    "tools[0].name": {"tools": [{}]},
    "tool_choice.type": {"tool_choice": {"type": "some"}},
    "thinking.type": {"thinking": {"type": "deep"}},
    "mcp_servers": {"mcp_servers": [{"url": "http://evil.example"}]},
    "output_config.format.schema": {"output_config": {"format": {"type": "json_schema"}}},
    "output_config.format.type": {"output_config": {"format": {"type": "grammar"}}},
    "output_config.format.strict": {
        "output_config": {"format": {"type": "json_schema", "schema": {}, "strict": True}}
    },
    "nonsense": {"nonsense": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        message(**REFUSED[name])
    assert str(caught.value).startswith(f"{name}: ")


def test_the_form_of_the_answer_reaches_the_request() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    config = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    request = message(output_config=config).request

    assert json.loads(request.constraint.json_schema) == schema
    assert request.reasoning.most_tokens == 1024


def events() -> list[GenerateEvent]:
    call = ToolCall(id="call_1", name="add", arguments='{"a": 1}')
    usage = Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=4)
    return [
        GenerateEvent(delta=Delta(token_ids=[7])),  # the opening mark
        GenerateEvent(delta=Delta(reasoning="Hm", token_ids=[2, 3])),
        GenerateEvent(delta=Delta(reasoning=".", token_ids=[4])),
        GenerateEvent(delta=Delta(token_ids=[8])),  # the closing one
        GenerateEvent(delta=Delta(text="I ")),
        GenerateEvent(delta=Delta(text="add.", token_ids=[1])),
        GenerateEvent(delta=Delta()),
        GenerateEvent(delta=Delta(calls=[call, call])),
        GenerateEvent(finish=Finish(reason="tool_calls", usage=usage)),
    ]


def stream(asked: Asked, answer: list[GenerateEvent]) -> list[Any]:
    parts = [asked.reply.begin(), *(asked.reply.event(0, each) for each in answer)]
    frames = b"".join([*parts, asked.reply.end()]).decode().split("\n\n")
    assert frames.pop() == ""
    values = []
    for frame in frames:
        name, _, data = frame.partition("\n")
        values.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {values[-1]['type']}"
    return values


@pytest.mark.parametrize("thinks", [False, True])
def test_a_stream_builds_the_whole_message(thinks: bool) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024} if thinks else {"type": "disabled"}
    asked = message(thinking=thinking)
    whole = asked.reply.whole([collect(map(event_from_wire, events()))])

    values = stream(message(thinking=thinking), events())
    built: list[Any] = []
    for value in values:
        match value["type"]:
            case "content_block_start":
                assert value["index"] == len(built)
                built.append(value["content_block"])
            case "content_block_delta":
                block, delta = built[value["index"]], value["delta"]
                for name in ("text", "thinking"):
                    if name in delta:
                        block[name] += delta[name]
                if "partial_json" in delta:
                    block["input"] = json.loads(delta["partial_json"])
    assert [block["type"] for block in built] == [
        *(["thinking"] if thinks else []),
        *("text", "tool_use", "tool_use"),
    ]
    for block in whole["content"]:
        block.pop("citations", None)
    assert built == whole["content"]
    assert [value["type"] for value in values][-2:] == ["message_delta", "message_stop"]
    assert values[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert whole["stop_reason"] == "tool_use"
    assert values[-2]["usage"] == whole["usage"]
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (1, 4)
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 4}


@pytest.mark.parametrize(
    ("finish", "reason", "sequence"),
    [
        (Finish(reason="stop"), "end_turn", None),
        (Finish(reason="stop", stop_string="x"), "stop_sequence", "x"),
        (Finish(reason="length"), "max_tokens", None),
    ],
)
def test_reasons_of_the_end(finish: Finish, reason: str, sequence: str | None) -> None:
    whole = message().reply.whole([collect([event_from_wire(GenerateEvent(finish=finish))])])
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)


def test_errors_are_theirs() -> None:
    for error, kind in (
        (InputError("seed: no"), "invalid_request_error"),
        (BusyError("full"), "rate_limit_error"),
        (UnavailableError("loading"), "overloaded_error"),
        (ValueError("a secret"), "api_error"),
    ):
        value = anthropic_error(failure_of(error))
        assert (value["type"], value["error"]["type"]) == ("error", kind)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = ["system", "thinking", "stop_sequences", "top_p", *(n.split(".")[0] for n in REFUSED)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON))
def test_any_json_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert message(**fields).request.IsInitialized()


def test_what_a_coding_agent_sends_is_understood() -> None:
    """As Claude Code 2.1.197 does."""
    asked = message(
        messages=[*HELLO, {"role": "system", "content": [{"type": "text", "text": "Hurry."}]}],
        thinking={"type": "adaptive"},
        output_config={"effort": "low"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert asked.request.messages[-1] == Message(role="system", content="Hurry.")
    assert asked.request.reasoning == Reasoning(most_tokens=1024)
    budget = {"type": "enabled", "budget_tokens": 64}
    both = message(thinking=budget, output_config={"effort": "medium"}).request
    assert both.reasoning == Reasoning(most_tokens=64)
    off = message(thinking={"type": "disabled"}, output_config={"effort": "max"}).request
    assert off.reasoning == Reasoning(enabled=False)
