"""Every field of a request that may be wrong has a name that its client knows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coordinator.protocols.anthropic import read_message
from coordinator.protocols.asked import Asked
from coordinator.protocols.errors import failure_of, renamed
from coordinator.protocols.ollama import read_chat as read_ollama_chat
from coordinator.protocols.ollama import read_generate
from coordinator.protocols.openai_chat import read_chat
from coordinator.protocols.openai_completions import read_completion
from coordinator.protocols.openai_responses import read_response
from unicluster.errors import BusyError, InputError
from unicluster.v1.chat_pb2 import GenerateRequest

HELLO = [{"role": "user", "content": "hello"}]
FUNCTION = {"name": "add", "parameters": {"type": "object"}}
SCHEMA = {"type": "object"}
SAMPLING = {"temperature": 1, "top_p": 0.5, "seed": 1, "stop": "a"}
PENALTIES = {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5}
OPTIONS = {**SAMPLING, "presence_penalty": 1, "repeat_penalty": 1.5, "top_k": 2, "num_predict": 3}
BODIES: list[tuple[Callable[[Any, str], Asked], dict[str, Any]]] = [
    (
        read_chat,
        {
            "messages": HELLO,
            **SAMPLING,
            **PENALTIES,
            "logit_bias": {"1": 2},
            "max_completion_tokens": 9,
            "logprobs": True,
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "required",
            "response_format": {"type": "regex", "regex": "a"},
            "reasoning_effort": "low",
            "max_reasoning_tokens": 4,
            "chat_template_kwargs": {"a": 1},
        },
    ),
    (read_chat, {"messages": HELLO, "max_tokens": 9, "response_format": {"type": "json_object"}}),
    (read_completion, {"prompt": "hello", **SAMPLING, "max_tokens": 9, "logprobs": 1}),
    (read_completion, {"prompt": [1, 2], "max_tokens": 9}),
    (
        read_response,
        {
            "input": "hello",
            "temperature": 1,
            "max_output_tokens": 9,
            "tools": [{"type": "function", **FUNCTION}],
            "parallel_tool_calls": False,
            "tool_choice": {"type": "function", "name": "add"},
            "reasoning": {"max_tokens": 3},
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        },
    ),
    (
        read_message,
        {
            "messages": HELLO,
            "max_tokens": 9,
            "top_k": 3,
            "stop_sequences": ["a"],
            "tools": [{"name": "add", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 9},
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
    ),
    (read_ollama_chat, {"messages": HELLO, "think": True, "format": SCHEMA, "options": OPTIONS}),
    (read_generate, {"prompt": "hello", "think": "low", "format": "json", "options": OPTIONS}),
    (read_generate, {"prompt": "hello", "raw": True}),
]


def fields_of(request: GenerateRequest) -> Iterator[str]:
    """Names of what is set, as messages of errors begin with them."""
    for field, value in request.ListFields():
        if field.name == "sampling":
            yield from (each.name for each, _ in value.ListFields())
        elif field.name in ("constraint", "reasoning"):
            yield field.name
            yield from (f"{field.name}.{each.name}" for each, _ in value.ListFields())
        else:
            yield field.name


@pytest.mark.parametrize(("read", "body"), BODIES)
def test_each_field_has_the_name_that_was_sent(read: Callable[..., Asked], body: Any) -> None:
    asked = read(body, "parrot")
    for field in fields_of(asked.request):
        error = renamed(InputError(f"{field}: no"), asked.names)
        path = failure_of(error).param
        assert path is not None, field
        value = body
        for name in path.split("."):
            assert name in value, (field, path)
            value = value[name]


def test_other_errors_stay_as_they_are() -> None:
    for error in (BusyError("messages: full"), InputError("stop"), InputError("other: no")):
        assert renamed(error, {"messages": "input", "stop": "stop_sequences"}) is error
