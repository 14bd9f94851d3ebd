"""Ollama's chat and generate, as pure functions between their JSON and the gateway's messages."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from coordinator.protocols.asked import LINES, Asked, Json, Stamp, as_json, stamp
from coordinator.protocols.errors import Failure
from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_fields import MOST_TOKENS, stop_strings
from coordinator.protocols.openai_tools import read_function
from unicluster.client.answers import Answer, Timings, ToolCall, Usage
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest, Message
from unicluster.v1.chat_pb2 import Timings as WireTimings
from unicluster.v1.chat_pb2 import ToolCall as WireCall
from unicluster.v1.chat_pb2 import Usage as WireUsage

ROLES = ("system", "user", "assistant", "tool")
NUMBERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Of fields that have another name in GenerateRequest.
FIELD_NAMES = {
    **{ours: f"options.{name}" for name, ours in NUMBERS.items()},
    "top_k": "options.top_k",
    "seed": "options.seed",
    "stop": "options.stop",
    "max_tokens": "options.num_predict",
    "constraint": "format",
    "reasoning": "think",
}
# Of /api/generate, whose messages are made of its prompt.
GENERATE_NAMES = {**FIELD_NAMES, "messages": "prompt"}
# A time of none, as Go writes it.
_NO_TIME = re.compile(r"[+-]?(?:0+(?:\.0*)?(?:ns|us|µs|ms|s|m|h)?)+")
# Of the machine that computes, not of the answer; here the plan decides.
OF_MACHINES = ("num_gpu", "main_gpu", "num_thread", "num_batch", "use_mmap", "numa", "low_vram")
TEMPLATES = {
    "suffix": "text can't be filled in",
    "images": "the model reads text",
    "template": "the model's own is used",
    "context": "send the conversation to /api/chat",
}


def read_chat(body: Any, model: str) -> Asked:
    """The request to /api/chat; `model` names the model in the answer.

    Without messages it asks for no answer: so Ollama's clients load a model. Raises InputError
    that begins with the field's path.
    """
    fields = Fields(body)
    request = GenerateRequest(model=name_of(fields.text("model") or ""))
    for at, item in enumerate(fields.items("messages") or []):
        request.messages.append(_message(Fields(item, f"messages[{at}]")))
    for at, item in enumerate(fields.items("tools") or []):
        tool = Fields(item, f"tools[{at}]")
        tool.choice("type", ("function",))
        function = tool.object("function")
        if function is None:
            raise InputError(f"{tool.path('function')}: missing")
        request.tools.append(read_function(function))
        tool.done()
    return _asked(fields, request, model, "message", FIELD_NAMES)


def read_generate(body: Any, model: str) -> Asked:
    """The request to /api/generate, which asks for no answer without a prompt. As `read_chat`."""
    fields = Fields(body)
    request = GenerateRequest(model=name_of(fields.text("model") or ""))
    prompt, system = fields.text("prompt"), fields.text("system")
    raw = fields.flag("raw")
    if not prompt:
        return _asked(fields, request, model, "response", GENERATE_NAMES)
    if raw:
        if system:
            raise InputError("system: not with raw, which is the whole prompt")
        request.prompt = prompt
    else:
        if system:
            request.messages.append(Message(role="system", content=system))
        request.messages.append(Message(role="user", content=prompt))
    return _asked(fields, request, model, "response", GENERATE_NAMES)


def name_of(name: str) -> str:
    """A model's name without the tag that stands for any."""
    return name.removesuffix(":latest")


def _asked(
    fields: Fields, request: GenerateRequest, model: str, form: str, names: Mapping[str, str]
) -> Asked:
    stream = fields.take("stream")
    if not isinstance(stream, bool | None):
        raise InputError("stream: must be true or false")
    think = fields.choice("think", (True, False, "low", "medium", "high"))
    if isinstance(think, str):
        request.reasoning.effort = think
    elif think is not None:
        request.reasoning.enabled = think
    _read_format(fields, request)
    context = 0
    if (options := fields.object("options")) is not None:
        context = _read_options(options, request)
    asks = bool(request.messages or request.prompt)
    # The model stays as long as `serve` runs: only where that is all that is asked for, who asks
    # would take an answer for the memory being free.
    if _is_none(fields.take("keep_alive")) and not asks:
        raise InputError(
            "keep_alive: the model is not unloaded from here: it stays as long as `serve` runs"
        )
    fields.refuse(TEMPLATES)
    fields.done()
    reply = OllamaReply(stamp("", model), form, thinks=think is not False)
    count = 1 if asks else 0
    return Asked(request, reply, stream is not False, count, context, names)


def _is_none(keep_alive: Any) -> bool:
    """Whether a `keep_alive` says that the model may go at once."""
    if isinstance(keep_alive, str):
        return _NO_TIME.fullmatch(keep_alive) is not None
    return isinstance(keep_alive, int | float) and keep_alive == 0 and keep_alive is not False


def _read_format(fields: Fields, request: GenerateRequest) -> None:
    form = fields.take("format")
    if form == "json":
        request.constraint.json_object = True
    elif isinstance(form, dict):
        request.constraint.json_schema = Fields(form, "format").as_json()
    elif form not in (None, ""):
        raise InputError("format: must be json or a JSON schema")


def _read_options(options: Fields, request: GenerateRequest) -> int:
    """Puts the options into the request; returns the context that is asked for, 0 for any."""
    sampling = request.sampling
    for name, ours in NUMBERS.items():
        if (value := options.number(name)) is not None:
            setattr(sampling, ours, value)
    if (top_k := options.whole("top_k", 0, MOST_TOKENS)) is not None:
        sampling.top_k = top_k
    if (seed := options.whole("seed", -(1 << 63), (1 << 64) - 1)) is not None:
        sampling.seed = seed % (1 << 64)
    limit = options.whole("num_predict", -2, MOST_TOKENS)
    if limit == 0:
        raise InputError(f"{options.path('num_predict')}: 0 tokens are no answer; -1 sets no limit")
    if limit is not None and limit > 0:  # below: as long as there is room
        request.max_tokens = limit
    request.stop.extend(stop_strings(options, "stop"))
    options.accept(*OF_MACHINES)
    context = options.whole("num_ctx", 1, MOST_TOKENS) or 0
    options.done()
    return context


def _message(fields: Fields) -> Message:
    role = fields.choice("role", ROLES)
    if role is None:
        raise InputError(f"{fields.path('role')}: missing")
    message = Message(role=role, content=fields.text("content") or "")
    thinking = fields.text("thinking")
    if role == "assistant":
        message.reasoning_content = thinking or ""
    for at, item in enumerate(fields.items("tool_calls") or []):
        call = Fields(item, f"{fields.path('tool_calls')}[{at}]")
        function = call.object("function")
        if function is None:
            raise InputError(f"{call.path('function')}: missing")
        arguments = function.object("arguments")
        made = WireCall(id=call.text("id") or "", name=function.needed_text("name"))
        made.arguments = arguments.as_json() if arguments is not None else "{}"
        function.accept("index")
        call.choice("type", ("function",))
        function.done()
        call.done()
        message.tool_calls.append(made)
    if role == "tool":
        names = [fields.text("tool_name"), fields.text("name")]
        message.name = names[0] or names[1] or ""
        message.tool_call_id = fields.text("tool_call_id") or ""
    fields.refuse({"images": "the model reads text"})
    fields.done()
    return message


# The last fields of what is answered where no answer was asked for.
LOADED: Json = {"done": True, "done_reason": "load"}


class OllamaReply:
    """An answer of /api/chat (`form` is message) or /api/generate (response), or its lines.

    Where no answer was asked for, it says that the model is loaded.
    """

    media_type = LINES
    waiting = b""  # there is no line that means nothing

    def __init__(self, stamp: Stamp, form: str, *, thinks: bool) -> None:
        self._model = stamp.model
        self._form = form
        self._thinks = thinks
        self._last: Json = LOADED

    def whole(self, answers: Sequence[Answer]) -> Json:
        if not answers:
            return {**self._said("", "", ()), **self._last}
        (answer,) = answers
        text = answer.text + "".join(answer.tool_calls)
        said = self._said(text, answer.reasoning, answer.calls)
        return {**said, **_end(answer.finish_reason, answer.usage, answer.timings)}

    def begin(self) -> bytes:
        return b""

    def event(self, index: int, event: GenerateEvent) -> bytes:
        if event.HasField("finish"):
            finish = event.finish
            self._last = _end(finish.reason, finish.usage, finish.timings)
            return b""
        delta = event.delta
        text, reasoning = delta.text + delta.tool_call, delta.reasoning
        if not (text or (reasoning and self._thinks) or delta.calls):
            return b""
        return _line({**self._said(text, reasoning, delta.calls), "done": False})

    def end(self) -> bytes:
        return _line({**self._said("", "", ()), **self._last})

    def failed(self, failure: Failure) -> bytes:
        return _line(ollama_error(failure))

    def _said(self, text: str, reasoning: str, calls: Sequence[ToolCall | WireCall]) -> Json:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        head: Json = {"model": self._model, "created_at": now}
        thought = {"thinking": reasoning} if reasoning and self._thinks else {}
        if self._form == "response":
            return {**head, "response": text, **thought}
        message: Json = {"role": "assistant", "content": text, **thought}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {**head, "message": message}


def ollama_error(failure: Failure) -> Json:
    """The error object of Ollama's API."""
    return {"error": failure.message, **failure.more()}


def _call(call: ToolCall | WireCall) -> Json:
    arguments = json.loads(call.arguments or "{}")
    return {"id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _end(reason: str, usage: Usage | WireUsage, timings: Timings | WireTimings) -> Json:
    """The last fields of an answer; times in nanoseconds."""
    prefill_s = timings.time_to_first_token_s - timings.queue_s
    total_s = timings.time_to_first_token_s + timings.decode_s
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": _nanoseconds(total_s),
        "load_duration": _nanoseconds(timings.queue_s),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(prefill_s),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(timings.decode_s),
    }


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _line(value: Json) -> bytes:
    return f"{as_json(value)}\n".encode()
