"""OpenAI's chat completions, as pure functions between their JSON and the gateway's messages."""

from collections.abc import Iterable, Sequence
from typing import Any

from coordinator.protocols.asked import COMMENT, EVENTS, Asked, Json, Stamp, joined, sse, stamp
from coordinator.protocols.errors import Failure, openai_error
from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_chunks import Chunks, head
from coordinator.protocols.openai_fields import (
    MOST_CHOICES,
    read_format,
    read_limit,
    read_reasoning,
    read_sampling,
    read_service,
    read_streaming,
    usage_json,
)
from coordinator.protocols.openai_messages import read_messages
from coordinator.protocols.openai_tools import calls_delta, calls_json, read_tools
from unicluster.chat_limits import MOST_LOGPROBS
from unicluster.client.answers import Answer, TokenLogprob
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest
from unicluster.v1.chat_pb2 import TokenLogprob as WireLogprob

NOT_YET = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
    "prediction": "leave it out",
    "web_search_options": "nothing is looked up",
    "verbosity": "leave it out",
    "moderation": "nothing is moderated",
}


# Of fields that have another name in GenerateRequest.
NAMES = {
    "constraint": "response_format",
    "constraint.json_schema": "response_format.json_schema.schema",
    "constraint.regex": "response_format.regex",
    "constraint.grammar": "response_format.grammar",
    "reasoning": "reasoning_effort",
    "reasoning.most_tokens": "max_reasoning_tokens",
    "template_arguments": "chat_template_kwargs",
    "single_tool_call": "parallel_tool_calls",
    "tool_choice.name": "tool_choice.function.name",
}


def read_chat(body: Any, model: str) -> Asked:
    """The request to /v1/chat/completions; `model` names the model in the answer.

    Raises InputError that begins with the field's path.
    """
    fields = Fields(body)
    request = GenerateRequest(model=fields.text("model") or "")
    request.messages.extend(read_messages(fields.items("messages") or []))
    read_sampling(fields, request)
    limit = read_limit(fields, request, "max_tokens", "max_completion_tokens")
    _read_logprobs(fields, request)
    stream, include_usage = read_streaming(fields)
    count = fields.whole("n", 1, MOST_CHOICES) or 1
    read_service(fields)
    read_format(fields, request)
    read_tools(fields, request)
    _read_template_variables(fields, request)
    read_reasoning(fields, request, "reasoning_effort", "max_reasoning_tokens")
    _read_plain_text(fields)
    fields.done()
    reply = ChatReply(stamp("chatcmpl-", model), count, include_usage)
    return Asked(request, reply, stream, count, names={**NAMES, "max_tokens": limit})


def _read_logprobs(fields: Fields, request: GenerateRequest) -> None:
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if top and not wanted:
        raise InputError("top_logprobs: only with logprobs")
    if wanted:
        request.logprobs = top or 0


def _read_template_variables(fields: Fields, request: GenerateRequest) -> None:
    variables = fields.object("chat_template_kwargs")
    if variables is not None:
        request.template_arguments = variables.as_json()


def _read_plain_text(fields: Fields) -> None:
    """Settings that say what is the case anyway; others are refused by name."""
    fields.choice("modalities", (["text"],))
    fields.refuse(NOT_YET)


class ChatReply:
    """A chat completion, or its chunks. `include_usage`: the last chunk says what was used."""

    media_type = EVENTS
    waiting = COMMENT

    def __init__(self, stamp: Stamp, count: int, include_usage: bool) -> None:
        self._stamp = stamp
        self._chunks = Chunks(stamp, "chat.completion.chunk", include_usage)
        self._calls = [0] * count  # tool calls of each answer so far

    def whole(self, answers: Sequence[Answer]) -> Json:
        return {
            **head(self._stamp, "chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": _message(answer),
                    "logprobs": _logprobs(answer.logprobs) if answer.logprobs else None,
                    "finish_reason": answer.finish_reason,
                }
                for index, answer in enumerate(answers)
            ],
            "usage": usage_json(
                [answer.usage for answer in answers],
                sum(answer.reasoning_tokens for answer in answers),
            ),
        }

    def begin(self) -> bytes:
        indices = range(len(self._calls))
        return joined(self._chunk(index, {"role": "assistant", "content": ""}) for index in indices)

    def event(self, index: int, event: GenerateEvent) -> bytes:
        self._chunks.note(index, event)
        if event.HasField("finish"):
            return self._chunk(index, {}, event.finish.reason)
        delta: Json = {}
        # What was not read as calls is what the model has written: nothing of that is dropped.
        if text := event.delta.text + event.delta.tool_call:
            delta["content"] = text
        if event.delta.reasoning:
            delta["reasoning_content"] = event.delta.reasoning
        if calls := event.delta.calls:
            delta["tool_calls"] = calls_delta(calls, self._calls[index])
            self._calls[index] += len(calls)
        if not delta and not event.delta.logprobs:
            return b""
        return self._chunk(index, delta, logprobs=event.delta.logprobs)

    def end(self) -> bytes:
        return self._chunks.end()

    def failed(self, failure: Failure) -> bytes:
        return sse(openai_error(failure))

    def _chunk(
        self,
        index: int,
        delta: Json,
        reason: str | None = None,
        logprobs: Sequence[WireLogprob] = (),
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        return self._chunks.one(choice)


def _message(answer: Answer) -> Json:
    text = answer.text + "".join(answer.tool_calls)
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if answer.calls:
        message |= {"content": text or None, "tool_calls": calls_json(answer.calls)}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return message


def _logprobs(entries: Iterable[TokenLogprob | WireLogprob]) -> Json:
    content = [
        {**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(entry: TokenLogprob | WireLogprob) -> Json:
    return {
        "token": entry.text.decode(errors="replace"),
        "logprob": entry.logprob,
        "bytes": list(entry.text),
    }
