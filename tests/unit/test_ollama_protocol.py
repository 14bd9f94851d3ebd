"""Requests of Ollama's API as the gateway's messages, and events as its lines."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.protocols.asked import Asked
from coordinator.protocols.ollama import read_chat, read_generate
from unicluster.client.answers import collect, event_from_wire
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import (
    Delta,
    Finish,
    GenerateEvent,
    GenerateRequest,
    Message,
    Sampling,
    Timings,
    ToolCall,
    Usage,
)

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Asked:
    return read_chat({"model": "parrot:latest", "messages": HELLO} | fields, "parrot")


def test_options_reach_the_request() -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.25,
        "repeat_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "seed": 7,
        "num_predict": 9,
        "stop": ["a"],
        "num_ctx": 512,
        "num_thread": 4,
    }
    asked = chat(options=options, keep_alive="5m", format="json")

    assert (asked.context, asked.stream) == (512, True)
    request = asked.request
    assert request.constraint.json_object
    request.ClearField("constraint")
    assert request == GenerateRequest(
        model="parrot",
        messages=[Message(role="user", content="hello")],
        max_tokens=9,
        stop=["a"],
        sampling=Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=1,
            frequency_penalty=-1,
            seed=7,
        ),
    )
    assert not chat(options={"num_predict": -1}).request.HasField("max_tokens")


def test_calls_and_results_reach_the_request() -> None:
    called = {"function": {"name": "add", "arguments": {"a": None}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    request = chat(
        messages=[
            *HELLO,
            {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [called]},
            {"role": "tool", "tool_name": "add", "content": "5"},
        ],
        tools=[tool],
    ).request

    assert [each.name for each in request.tools] == ["add"]
    call = ToolCall(name="add", arguments='{"a": null}')
    assert list(request.messages)[1:] == [
        Message(role="assistant", tool_calls=[call], reasoning_content="Hm."),
        Message(role="tool", name="add", content="5"),
    ]


def test_a_result_may_name_its_tool_twice() -> None:
    result = {"role": "tool", "content": "5", "tool_name": "add", "name": "sum"}
    assert chat(messages=[*HELLO, result]).request.messages[1].name == "add"


def test_a_raw_prompt_is_the_whole_one() -> None:
    raw = read_generate({"prompt": "Once", "raw": True}, "parrot").request
    plain = read_generate({"prompt": "hi", "system": "Be brief."}, "parrot").request

    assert raw == GenerateRequest(prompt="Once")
    assert [message.role for message in plain.messages] == ["system", "user"]


REFUSED: dict[str, dict[str, Any]] = {
    "messages[0].role": {"messages": [{"role": "robot", "content": ""}]},
    "messages[0].images": {"messages": [{"role": "user", "content": "", "images": ["a"]}]},
    "tools[0].function": {"tools": [{"type": "function"}]},
    "format": {"format": "xml"},
    "stream": {"stream": "yes"},
    "think": {"think": "much"},
    "template": {"template": "{{ .Prompt }}"},
    "options.mirostat": {"options": {"mirostat": 1}},
    "options.temperature": {"options": {"temperature": "hot"}},
    "nonsense": {"nonsense": 1},
    "options.num_predict": {"options": {"num_predict": 0}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        chat(**REFUSED[name])
    assert str(caught.value).startswith(f"{name}: ")


LOADS = [(read_chat, {}), (read_chat, {"messages": []}), (read_generate, {"prompt": ""})]
LOADS += [(read_generate, {"system": "Be brief."}), (read_generate, {"raw": True})]


@pytest.mark.parametrize(("read", "body"), LOADS)
def test_nothing_to_answer_asks_whether_the_model_is_loaded(read: Any, body: Any) -> None:
    asked = read({"keep_alive": "10m"} | body, "parrot")
    (line,) = asked.reply.end().splitlines()

    assert asked.requests() == []
    for said in (asked.reply.whole([]), json.loads(line)):
        assert (said["done"], said["done_reason"], said["model"]) == (True, "load", "parrot")
        assert said["response"] == "" if read is read_generate else not said["message"]["content"]


@pytest.mark.parametrize("none", [0, 0.0, "0", "0s", "-0m", "0h0m0.0s"])
def test_that_the_model_is_not_unloaded_is_said(none: Any) -> None:
    with pytest.raises(InputError, match=r"keep_alive: .*stays as long as `serve` runs"):
        read_generate({"keep_alive": none}, "parrot")
    assert chat(keep_alive=none).requests()  # an answer comes first
    assert not read_generate({"keep_alive": "0h1m"}, "parrot").requests()


def test_lines_build_the_whole_answer() -> None:
    call = ToolCall(id="call_1", name="add", arguments='{"a": 1}')
    usage = Usage(prompt_tokens=5, completion_tokens=7)
    timings = Timings(queue_s=0.5, time_to_first_token_s=2, decode_s=3)
    events = [
        GenerateEvent(delta=Delta(reasoning="Hm.")),
        GenerateEvent(delta=Delta(text="I ")),
        GenerateEvent(delta=Delta(text="add.")),
        GenerateEvent(delta=Delta(calls=[call])),
        GenerateEvent(finish=Finish(reason="tool_calls", usage=usage, timings=timings)),
    ]
    whole = chat().reply.whole([collect(map(event_from_wire, events))])
    reply = chat().reply
    parts = [reply.begin(), *(reply.event(0, event) for event in events), reply.end()]
    *lines, last = [json.loads(line) for line in b"".join(parts).splitlines()]

    assert whole["message"]["thinking"] == lines[0]["message"]["thinking"] == "Hm."
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
    assert lines[-1]["message"]["tool_calls"] == whole["message"]["tool_calls"]
    assert not any(line["done"] for line in lines)
    for name in ("done", "done_reason", "eval_count", "total_duration", "eval_duration"):
        assert last[name] == whole[name]
    assert (last["prompt_eval_duration"], last["total_duration"]) == (1_500_000_000, 5_000_000_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = ["options", "keep_alive", "system", "prompt", "raw", *(n.split(".")[0] for n in REFUSED)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([read_chat, read_generate]),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON),
)
def test_any_json_is_a_request_or_a_refusal(read: Any, fields: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert read(fields, "parrot").request.IsInitialized()
