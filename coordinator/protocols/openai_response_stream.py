"""The items of an OpenAI response, whole or as the events of its stream."""

import secrets
from collections.abc import Sequence

from coordinator.protocols.asked import COMMENT, EVENTS, Json, joined, sse
from coordinator.protocols.errors import Failure
from unicluster.client.answers import Answer, ToolCall, Usage
from unicluster.client.reasoning import ReasoningTokens
from unicluster.v1.chat_pb2 import GenerateEvent
from unicluster.v1.chat_pb2 import ToolCall as WireCall
from unicluster.v1.chat_pb2 import Usage as WireUsage


class ResponseReply:
    """A response; `described` is it before there is anything of it."""

    media_type = EVENTS
    waiting = COMMENT

    def __init__(self, described: Json) -> None:
        self._response = described
        self._sent = 0  # events
        self._text = ""  # of the item that is open
        self._reasoned = ReasoningTokens()
        self._ended: GenerateEvent | None = None
        self._output: list[Json] = []  # items, of which the last may be open
        self._open = ""  # its type

    def whole(self, answers: Sequence[Answer]) -> Json:
        (answer,) = answers
        output = []
        if answer.reasoning:
            output.append(_reasoning(_id("rs"), answer.reasoning))
        if text := answer.text + "".join(answer.tool_calls):
            output.append(_message(_id("msg"), text))
        output += [_call(_id("fc"), call) for call in answer.calls]
        usage = _usage(answer.usage, answer.reasoning_tokens)
        return {**self._response, **_end(answer.finish_reason), "output": output, "usage": usage}

    def begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return joined(self._event(kind, response=self._response) for kind in kinds)

    def event(self, index: int, event: GenerateEvent) -> bytes:
        if event.HasField("finish"):
            self._ended = event
            return self._close()
        delta, parts = event.delta, []
        self._reasoned.add(delta)
        if delta.reasoning:
            parts += [self._begin("reasoning"), self._add(delta.reasoning)]
        if text := delta.text + delta.tool_call:
            parts += [self._begin("message"), self._add(text)]
        for call in delta.calls:
            parts += [self._close(), self._add_call(call)]
        return joined(parts)

    def end(self) -> bytes:
        if self._ended is None:
            return b""
        finish = self._ended.finish
        usage = _usage(finish.usage, self._reasoned.count)
        response = {**self._response, **_end(finish.reason), "output": self._output, "usage": usage}
        return self._event(f"response.{response['status']}", response=response)

    def failed(self, failure: Failure) -> bytes:
        problem = {"code": failure.code, "message": failure.message, "param": failure.param}
        return self._event("error", **problem, **failure.more())

    def _event(self, kind: str, **fields: object) -> bytes:
        value = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return sse(value, kind)

    def _begin(self, kind: str) -> bytes:
        """Begins an item of that type, unless one is open."""
        if self._open == kind:
            return b""
        closed = self._close()
        self._open, self._text = kind, ""
        if kind == "reasoning":
            item = _reasoning(_id("rs"), "")
            item |= {"content": [], "status": "in_progress"}
        else:
            item = _message(_id("msg"), "")
            item |= {"content": [], "status": "in_progress"}
        self._output.append(item)
        begun = self._event("response.output_item.added", **self._at, item=item)
        if kind == "reasoning":
            return closed + begun
        part = self._event("response.content_part.added", **self._in, part=_part(""))
        return closed + begun + part

    def _add(self, text: str) -> bytes:
        self._text += text
        if self._open == "reasoning":
            return self._event("response.reasoning_text.delta", **self._in, delta=text)
        return self._event("response.output_text.delta", **self._in, delta=text, logprobs=[])

    def _close(self) -> bytes:
        """Ends the item that is open."""
        kind, self._open, text = self._open, "", self._text
        if not kind:
            return b""
        id_ = str(self._output[-1]["id"])
        parts = []
        if kind == "reasoning":
            self._output[-1] = _reasoning(id_, text)
            parts.append(self._event("response.reasoning_text.done", **self._in, text=text))
        else:
            self._output[-1] = _message(id_, text)
            done = {**self._in, "text": text, "logprobs": []}
            parts.append(self._event("response.output_text.done", **done))
            part = _part(text)
            parts.append(self._event("response.content_part.done", **self._in, part=part))
        item = self._output[-1]
        return joined([*parts, self._event("response.output_item.done", **self._at, item=item)])

    def _add_call(self, call: WireCall) -> bytes:
        item = _call(_id("fc"), call)
        begun = {**item, "arguments": "", "status": "in_progress"}
        self._output.append(item)
        where = {"item_id": item["id"], **self._at}
        kind = "response.function_call_arguments"
        said = {**where, "arguments": call.arguments, "name": call.name}
        return joined(
            [
                self._event("response.output_item.added", **self._at, item=begun),
                self._event(f"{kind}.delta", **where, delta=call.arguments),
                self._event(f"{kind}.done", **said),
                self._event("response.output_item.done", **self._at, item=item),
            ]
        )

    @property
    def _at(self) -> Json:
        return {"output_index": len(self._output) - 1}

    @property
    def _in(self) -> Json:
        return {"item_id": self._output[-1]["id"], **self._at, "content_index": 0}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _reasoning(id_: str, text: str) -> Json:
    content = [{"type": "reasoning_text", "text": text}]
    return {
        "id": id_,
        "type": "reasoning",
        "summary": [],
        "content": content,
        "status": "completed",
    }


def _message(id_: str, text: str) -> Json:
    return {
        "id": id_,
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [_part(text)],
    }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(id_: str, call: ToolCall | WireCall) -> Json:
    return {
        "id": id_,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _end(reason: str) -> Json:
    if reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed"}


def _usage(usage: Usage | WireUsage, reasoning_tokens: int) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
