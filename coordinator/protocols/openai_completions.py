"""OpenAI's completions of plain text, as pure functions between JSON and messages."""

from collections.abc import Iterable, Sequence
from typing import Any

from coordinator.protocols.asked import COMMENT, EVENTS, Asked, Json, Stamp, sse, stamp
from coordinator.protocols.errors import Failure, openai_error
from coordinator.protocols.fields import Fields, clean
from coordinator.protocols.openai_chunks import Chunks, head
from coordinator.protocols.openai_fields import (
    MOST_CHOICES,
    read_limit,
    read_sampling,
    read_service,
    read_streaming,
    token_ids,
    usage_json,
)
from unicluster.chat_limits import MOST_LOGPROBS
from unicluster.client.answers import Answer, TokenLogprob
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest
from unicluster.v1.chat_pb2 import TokenLogprob as WireLogprob

# Where the request says nothing, as OpenAI's documents have it.
DEFAULT_TOKENS = 16

KIND = "text_completion"  # a whole one, and its chunks


def read_completion(body: Any, model: str) -> Asked:
    """The request to /v1/completions; `model` names the model in the answer.

    Raises InputError that begins with the field's path.
    """
    fields = Fields(body)
    request = GenerateRequest(model=fields.text("model") or "", max_tokens=DEFAULT_TOKENS)
    _read_prompt(fields.take("prompt"), request)
    read_sampling(fields, request)
    read_limit(fields, request, "max_tokens")
    logprobs = fields.take("logprobs")
    if logprobs is not None and logprobs is not False:
        limited = Fields({"logprobs": logprobs})
        request.logprobs = limited.whole("logprobs", 0, MOST_LOGPROBS) or 0
    stream, include_usage = read_streaming(fields)
    count = fields.whole("n", 1, MOST_CHOICES) or 1
    if (fields.whole("best_of", 1, MOST_CHOICES) or count) != count:
        raise InputError("best_of: not supported here: it must be n")
    fields.choice("echo", (False,))
    fields.refuse({"suffix": "text can't be filled in"})
    read_service(fields)
    fields.done()
    reply = CompletionReply(stamp("cmpl-", model), count, include_usage)
    return Asked(request, reply, stream, count, names={"token_ids": "prompt"})


def _read_prompt(prompt: Any, request: GenerateRequest) -> None:
    """A text, or token ids, or a list of one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        request.prompt = clean(prompt, "prompt")
    elif isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list):
        request.token_ids.extend(token_ids(prompt, "prompt"))
    elif isinstance(prompt, list) and len(prompt) > 1:
        raise InputError("prompt: several prompts are not supported here: send a request for each")
    else:
        raise InputError("prompt: must be a text or a list of token ids")


class CompletionReply:
    """A completion, or its chunks. `include_usage`: the last chunk says what was used."""

    media_type = EVENTS
    waiting = COMMENT

    def __init__(self, stamp: Stamp, count: int, include_usage: bool) -> None:
        self._stamp = stamp
        self._chunks = Chunks(stamp, KIND, include_usage)
        self._offsets = [0] * count

    def whole(self, answers: Sequence[Answer]) -> Json:
        choices = [
            self._choice(
                index,
                answer.reasoning + answer.text + "".join(answer.tool_calls),
                answer.finish_reason,
                answer.logprobs,
            )
            for index, answer in enumerate(answers)
        ]
        reasoning_tokens = sum(answer.reasoning_tokens for answer in answers)
        usage = usage_json([answer.usage for answer in answers], reasoning_tokens)
        return {**head(self._stamp, KIND), "choices": choices, "usage": usage}

    def begin(self) -> bytes:
        return b""

    def event(self, index: int, event: GenerateEvent) -> bytes:
        self._chunks.note(index, event)
        if event.HasField("finish"):
            return self._chunks.one(self._choice(index, "", event.finish.reason))
        delta = event.delta
        text = delta.reasoning + delta.text + delta.tool_call
        if not text and not delta.logprobs:
            return b""
        return self._chunks.one(self._choice(index, text, None, delta.logprobs))

    def end(self) -> bytes:
        return self._chunks.end()

    def failed(self, failure: Failure) -> bytes:
        return sse(openai_error(failure))

    def _choice(
        self,
        index: int,
        text: str,
        reason: str | None,
        logprobs: Sequence[TokenLogprob | WireLogprob] = (),
    ) -> Json:
        entries = self._logprobs(index, logprobs) if logprobs else None
        return {"index": index, "text": text, "logprobs": entries, "finish_reason": reason}

    def _logprobs(self, index: int, entries: Iterable[TokenLogprob | WireLogprob]) -> Json:
        result: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            text = entry.text.decode(errors="replace")
            result["tokens"].append(text)
            result["token_logprobs"].append(entry.logprob)
            top = {each.text.decode(errors="replace"): each.logprob for each in entry.top}
            result["top_logprobs"].append(top)
            result["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return result
