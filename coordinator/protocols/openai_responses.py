"""OpenAI's responses, without state: requests as the gateway's, whole answers as their objects."""

from collections.abc import Sequence
from typing import Any

from coordinator.protocols.asked import Asked, Json, Stamp, stamp
from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_fields import (
    read_limit,
    read_reasoning,
    read_sampling,
    read_schema,
    read_service,
)
from coordinator.protocols.openai_messages import content_text, read_messages
from coordinator.protocols.openai_response_stream import ResponseReply
from coordinator.protocols.openai_tools import read_function
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest, Message, ToolCall

STATELESS = "nothing is stored here: send the whole conversation as input"
NOT_HERE = {
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "background": "wait for the answer, or stream it",
    "prompt": "prompts are not stored here",
    "max_tool_calls": "no tool is called here",
    "context_management": "send the items that count",
    "moderation": "nothing is moderated",
}


# Of fields that have another name in GenerateRequest.
NAMES = {
    "messages": "input",
    "constraint": "text.format",
    "constraint.json_schema": "text.format.schema",
    "reasoning.most_tokens": "reasoning.max_tokens",
    "max_tokens": "max_output_tokens",
    "single_tool_call": "parallel_tool_calls",
}


def read_response(body: Any, model: str) -> Asked:
    """The request to /v1/responses; `model` names the model in the answer.

    Raises InputError that begins with the field's path.
    """
    fields = Fields(body)
    request = GenerateRequest(model=fields.text("model") or "")
    if instructions := fields.text("instructions"):
        request.messages.append(Message(role="system", content=instructions))
    request.messages.extend(_read_input(fields.take("input")))
    read_sampling(fields, request)
    read_limit(fields, request, "max_output_tokens")
    tools = fields.items("tools") or []
    for at, item in enumerate(tools):
        tool = Fields(item, f"tools[{at}]")
        if tool.choice("type", ("function",)) is None:
            raise InputError(f"{tool.path('type')}: missing")
        request.tools.append(read_function(tool))
    _read_choice(fields, request)
    _read_text(fields, request)
    _read_rest(fields, request)
    stream = fields.flag("stream")
    fields.done()
    described = _described(stamp("resp_", model), request, tools)
    return Asked(request, ResponseReply(described), stream, names=NAMES)


def _read_rest(fields: Fields, request: GenerateRequest) -> None:
    read_service(fields)
    fields.choice("truncation", ("disabled",))
    fields.choice("include", ([], ["reasoning.encrypted_content"]))  # nothing is encrypted
    fields.whole("top_logprobs", 0, 0)
    if (options := fields.object("stream_options")) is not None:
        options.choice("include_obfuscation", (False,))
        options.done()
    if (reasoning := fields.object("reasoning")) is not None:
        reasoning.choice("summary", ("auto",))  # the reasoning is shown whole
        read_reasoning(reasoning, request, "effort", "max_tokens")
        reasoning.done()
    fields.refuse(NOT_HERE)


def _read_input(value: Any) -> list[Message]:
    """A text, or a list of messages, calls, their results, and reasoning."""
    if isinstance(value, str):
        return read_messages([{"role": "user", "content": value}], "input")
    if not isinstance(value, list) or not value:
        raise InputError("input: must be a text or a list of items that is not empty")
    messages: list[Message] = []
    reasoning = ""
    for at, item in enumerate(value):
        path = f"input[{at}]"
        kind = (item.get("type") if isinstance(item, dict) else None) or "message"
        if kind == "reasoning":
            reasoning += _reasoning(Fields(item, path))
        elif kind == "function_call":
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant", reasoning_content=reasoning))
                reasoning = ""
            messages[-1].tool_calls.append(_call(Fields(item, path)))
        elif kind == "function_call_output":
            messages.append(_result(Fields(item, path)))
        elif kind == "message":
            (message,) = read_messages([_without_phase(item)], "input", at)
            if message.role == "assistant":
                message.reasoning_content, reasoning = reasoning, ""
            messages.append(message)
        else:
            raise InputError(f"{path}.type: items of this type are not supported here")
    return messages


def _without_phase(item: Any) -> Any:
    return {k: v for k, v in item.items() if k != "phase"} if isinstance(item, dict) else item


def _reasoning(item: Fields) -> str:
    item.accept("type", "id", "status", "summary", "encrypted_content")
    content, path = item.items("content") or [], item.path("content")
    parts = [Fields(part, f"{path}[{at}]") for at, part in enumerate(content)]
    texts = []
    for part in parts:
        part.choice("type", ("reasoning_text",))
        texts.append(part.needed_text("text"))
        part.done()
    item.done()
    return "".join(texts)


def _call(item: Fields) -> ToolCall:
    item.accept("type", "id", "status")
    call = ToolCall(id=item.needed_text("call_id"), name=item.needed_text("name"))
    call.arguments = item.text("arguments") or ""
    item.done()
    return call


def _result(item: Fields) -> Message:
    item.accept("type", "id", "status")
    output = content_text(item.take("output"), item.path("output"))
    message = Message(role="tool", tool_call_id=item.needed_text("call_id"), content=output)
    item.done()
    return message


def _read_choice(fields: Fields, request: GenerateRequest) -> None:
    choice = fields.take("tool_choice")
    if isinstance(choice, dict):
        named = Fields(choice, "tool_choice")
        named.choice("type", ("function",))
        request.tool_choice.name = named.needed_text("name")
        named.done()
    elif choice == "required":
        request.tool_choice.required = True
    elif choice == "none":
        if request.tools:
            request.tool_choice.none = True
    elif choice not in (None, "auto"):
        raise InputError("tool_choice: must be none, auto, required, or a function to call")
    parallel = fields.choice("parallel_tool_calls", (True, False))
    request.single_tool_call = parallel is False and bool(request.tools)


def _read_text(fields: Fields, request: GenerateRequest) -> None:
    text = fields.object("text")
    if text is None:
        return
    text.choice("verbosity", ("medium",))
    form = text.object("format")
    text.done()
    if form is None:
        return
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        read_schema(form, request)
        return
    request.constraint.json_object = kind == "json_object"
    if kind != "json_object":
        request.ClearField("constraint")
    form.done()


def _described(stamp: Stamp, request: GenerateRequest, tools: Sequence[Any]) -> Json:
    """The response before there is anything of it."""
    sampling = request.sampling
    return {
        "id": stamp.id,
        "object": "response",
        "created_at": stamp.created,
        "status": "in_progress",
        "model": stamp.model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": request.max_tokens if request.HasField("max_tokens") else None,
        "parallel_tool_calls": not request.single_tool_call,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature if sampling.HasField("temperature") else None,
        "top_p": sampling.top_p if sampling.HasField("top_p") else None,
        "tool_choice": "auto",
        "tools": list(tools),
        "truncation": "disabled",
        "metadata": {},
        "usage": None,
    }
