"""Anthropic's messages, as pure functions between their JSON and the gateway's messages."""

from collections.abc import Sequence
from typing import Any

from coordinator.protocols.anthropic_messages import input_of, read_conversation, read_system
from coordinator.protocols.anthropic_output import read_thinking
from coordinator.protocols.asked import EVENTS, Asked, Json, Stamp, joined, sse, stamp
from coordinator.protocols.errors import Failure, anthropic_error
from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_fields import MOST_TOKENS, stop_strings
from unicluster.client.answers import Answer, Usage
from unicluster.client.reasoning import ReasoningTokens
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest, Tool
from unicluster.v1.chat_pb2 import Usage as WireUsage

NOT_HERE = {
    "mcp_servers": "no server is called",
    "container": "nothing is run here",
    "output_format": "its new name is output_config.format",
    "inference_geo": "the machines are where they are",
    "fallbacks": "one model is served",
}


# Of fields that have another name in GenerateRequest.
NAMES = {
    "constraint": "output_config.format",
    "constraint.json_schema": "output_config.format.schema",
    "reasoning": "thinking",
    "reasoning.most_tokens": "thinking.budget_tokens",
    "stop": "stop_sequences",
    "single_tool_call": "tool_choice.disable_parallel_tool_use",
}


def read_message(body: Any, model: str) -> Asked:
    """The request to /v1/messages; `model` names the model in the answer.

    Raises InputError that begins with the field's path.
    """
    fields = Fields(body)
    request = _read_prompt(fields)
    limit = fields.whole("max_tokens", 1, MOST_TOKENS)
    if limit is None:
        raise InputError("max_tokens: missing")
    request.max_tokens = limit
    for name in ("temperature", "top_p"):
        if (value := fields.number(name)) is not None:
            setattr(request.sampling, name, value)
    if (top_k := fields.whole("top_k", 0, MOST_TOKENS)) is not None:
        request.sampling.top_k = top_k
    request.stop.extend(stop_strings(fields, "stop_sequences"))
    stream = fields.flag("stream")
    fields.accept("metadata", "cache_control")
    fields.choice("service_tier", ("auto", "standard_only"))
    thinks = read_thinking(fields, request)
    fields.refuse(NOT_HERE)
    fields.done()
    return Asked(request, MessageReply(stamp("msg_", model), thinks), stream, names=NAMES)


def read_count(body: Any) -> GenerateRequest:
    """The request to /v1/messages/count_tokens. Raises as `read_message`."""
    fields = Fields(body)
    request = _read_prompt(fields)
    read_thinking(fields, request)
    fields.accept("cache_control")
    fields.refuse(NOT_HERE)
    fields.done()
    return request


def _read_prompt(fields: Fields) -> GenerateRequest:
    request = GenerateRequest(model=fields.text("model") or "")
    request.messages.extend(read_system(fields))
    request.messages.extend(read_conversation(fields.items("messages") or []))
    for at, item in enumerate(fields.items("tools") or []):
        request.tools.append(_tool(Fields(item, f"tools[{at}]")))
    if (choice := fields.object("tool_choice")) is not None:
        _read_choice(choice, request)
    return request


def _tool(fields: Fields) -> Tool:
    fields.choice("type", ("custom",))
    tool = Tool(name=fields.needed_text("name"), description=fields.text("description") or "")
    if (schema := fields.object("input_schema")) is not None:
        tool.parameters = schema.as_json()
    tool.strict = fields.flag("strict")
    fields.choice("defer_loading", (False,))
    fields.choice("allowed_callers", (["direct"],))
    fields.choice("eager_input_streaming", (True, False))  # calls are streamed whole
    fields.accept("cache_control")
    fields.done()
    return tool


def _read_choice(choice: Fields, request: GenerateRequest) -> None:
    kind = choice.choice("type", ("auto", "any", "tool", "none"))
    if kind == "any":
        request.tool_choice.required = True
    elif kind == "tool":
        request.tool_choice.name = choice.needed_text("name")
    elif kind == "none" and request.tools:
        request.tool_choice.none = True
    elif kind is None:
        raise InputError(f"{choice.path('type')}: missing")
    request.single_tool_call = choice.flag("disable_parallel_tool_use") and bool(request.tools)
    choice.done()


class MessageReply:
    """A message, or the events of its stream. `thinks`: with the model's reasoning."""

    media_type = EVENTS
    waiting = sse({"type": "ping"}, "ping")

    def __init__(self, stamp: Stamp, thinks: bool) -> None:
        self._stamp = stamp
        self._thinks = thinks
        self._block = -1  # number of the content block that was begun last
        self._kind = ""  # of that block while it is open
        self._reasoned = ReasoningTokens()
        self._ended: GenerateEvent | None = None

    def whole(self, answers: Sequence[Answer]) -> Json:
        (answer,) = answers
        content: list[Json] = []
        if answer.reasoning and self._thinks:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if text := answer.text + "".join(answer.tool_calls):
            content.append({"type": "text", "text": text, "citations": None})
        content += [
            {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": input_of(call.arguments),
            }
            for call in answer.calls
        ]
        return {
            **self._message(content),
            **_reason(answer.finish_reason, answer.stop_string),
            "usage": _usage(answer.usage, answer.reasoning_tokens),
        }

    def begin(self) -> bytes:
        message = {
            **self._message([]),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(0, 0), 0),
        }
        return sse({"type": "message_start", "message": message}, "message_start")

    def event(self, index: int, event: GenerateEvent) -> bytes:
        if event.HasField("finish"):
            self._ended = event
            return self._close()
        delta, parts = event.delta, []
        self._reasoned.add(delta)
        if delta.reasoning and self._thinks:
            parts += [self._open("thinking", {"thinking": "", "signature": ""})]
            parts += [self._add({"type": "thinking_delta", "thinking": delta.reasoning})]
        if text := delta.text + delta.tool_call:
            parts += [self._open("text", {"text": ""})]
            parts += [self._add({"type": "text_delta", "text": text})]
        for call in delta.calls:
            block = {"id": call.id, "name": call.name, "input": {}}
            parts += [self._close(), self._open("tool_use", block)]
            parts += [self._add({"type": "input_json_delta", "partial_json": call.arguments})]
            parts += [self._close()]
        return joined(parts)

    def end(self) -> bytes:
        if self._ended is None:
            return b""
        finish = self._ended.finish
        delta = {
            "type": "message_delta",
            "delta": _reason(finish.reason, finish.stop_string),
            "usage": _usage(finish.usage, self._reasoned.count),
        }
        return sse(delta, "message_delta") + sse({"type": "message_stop"}, "message_stop")

    def failed(self, failure: Failure) -> bytes:
        return sse(anthropic_error(failure), "error")

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self._stamp.id,
            "type": "message",
            "role": "assistant",
            "model": self._stamp.model,
            "content": content,
        }

    def _open(self, kind: str, block: Json) -> bytes:
        """Begins a block of that kind, unless one is open."""
        if self._kind == kind:
            return b""
        closed = self._close()
        self._block += 1
        self._kind = kind
        begun = {"type": kind, **block}
        event = {"type": "content_block_start", "index": self._block, "content_block": begun}
        return closed + sse(event, "content_block_start")

    def _add(self, delta: Json) -> bytes:
        event = {"type": "content_block_delta", "index": self._block, "delta": delta}
        return sse(event, "content_block_delta")

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        event = {"type": "content_block_stop", "index": self._block}
        return sse(event, "content_block_stop")


def _reason(reason: str, stop_string: str) -> Json:
    names = {"length": "max_tokens", "tool_calls": "tool_use"}
    named = names.get(reason, "stop_sequence" if stop_string else "end_turn")
    is_stop = named == "stop_sequence"
    return {"stop_reason": named, "stop_sequence": stop_string if is_stop else None}


def _usage(usage: Usage | WireUsage, reasoning_tokens: int) -> Json:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": reasoning_tokens},
    }
