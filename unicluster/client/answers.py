"""Options and answers of a chat, and their conversion to and from the wire."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from unicluster.client.prompts import (
    Messages,
    object_to_json,
    prompt_to_wire,
    tool_choice_to_wire,
    tools_to_wire,
)
from unicluster.client.reasoning import ReasoningTokens
from unicluster.client.trace import Trace, from_wire
from unicluster.errors import InputError, UnavailableError
from unicluster.v1 import chat_pb2 as wire


class Options(TypedDict, total=False):
    """Options of a request. Unset ones, and None, are the model's defaults."""

    model: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None  # added to the logits of these tokens
    max_tokens: int | None
    stop: str | Iterable[str] | None
    json_schema: Mapping[str, Any] | str | None  # the answer is JSON that matches it
    json_object: bool | None  # the answer is a JSON object
    regex: str | None  # the whole answer matches it
    grammar: str | None  # the answer follows it, in Lark's syntax
    logprobs: int | None  # 0: of the chosen tokens; n: also of the n most likely
    ignore_eos: bool | None  # an end token does not end the answer: it gets max_tokens
    no_reuse: bool | None  # compute the whole prompt, and keep nothing of it afterwards
    deadline: float | None  # seconds until the whole answer must be there
    trace: bool | None  # whether the Finish says where the time went
    tools: Iterable[Mapping[str, Any]] | None  # functions that the model may call
    tool_choice: str | None  # auto, none, required, or the name of a tool that must be called
    single_tool_call: bool | None  # the answer ends after its first call
    reasoning: bool | None  # whether the model reasons before it answers
    reasoning_effort: str | None  # none, minimal, low, medium, high, or as the template has it
    reasoning_tokens: int | None  # at most; then the answer begins
    template_arguments: Mapping[str, Any] | None  # more variables of the model's chat template
    on_status: "Callable[[Status], None] | None"  # called when the answer breaks off, or goes on


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple["TokenLogprob", ...] = ()
    text: bytes = b""  # of the token alone: a part of a character, perhaps


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer. `cached_tokens` of the prompt came from the prefix cache.

    `drafted_tokens` were drafted (speculative decoding), `accepted_tokens` of them accepted.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of an answer in seconds, measured on the head."""

    queue_s: float
    time_to_first_token_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `arguments` is JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. `calls` are there where the request has tools.

    `tool_call` is the raw text between the model's marks, where it could not be read as calls.
    """

    text: str = ""
    reasoning: str = ""
    tool_call: str = ""
    calls: tuple["ToolCall", ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event of every answer that came through. `reason` is stop, length or tool_calls.

    `trace` is there if it was asked for. `stop_string` is the one that ended the answer.
    """

    reason: str
    usage: Usage
    timings: Timings
    trace: Trace | None = None
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """A gap in an answer: its `state` is recovering, and then resumed. `detail`: why.

    `cause` says it in a word: killed, out of memory, frozen, unreachable, disk full, driver fault,
    ... It may be known only when the answer goes on; empty: it is not.
    """

    state: str
    detail: str
    cause: str = ""


Event = Delta | Finish


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    reasoning: str
    tool_calls: tuple[str, ...]  # raw texts
    finish_reason: str
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    trace: Trace | None = None
    calls: tuple[ToolCall, ...] = ()
    stop_string: str = ""
    reasoning_tokens: int = 0  # of usage.completion_tokens


@dataclass(frozen=True, slots=True)
class ServedStage:
    """One machine's share of the model: layers [first_layer, end_layer).

    `engine`: mlx or ggml.
    """

    node: str
    first_layer: int
    end_layer: int
    weight_bytes: int
    engine: str = "mlx"
    address: str = ""


@dataclass(frozen=True, slots=True)
class ChatInfo:
    """A deployment. `state` is loading, ready, recovering or failed; `detail` says why.

    `cause` is that of the loss for which it does not answer, in a word; empty where there is none.
    `live_caches` counts the KV caches of answers on all machines but the first. The prefix
    cache has `kept_caches` of finished answers, of `kept_bytes` on all machines together.
    `lanes` are batches that take turns on the machines. `ring_s` is the time of an empty frame
    once round the machines. `progress`, while it loads, is the share of the weights, 0 to 1, that
    are fetched and loaded.
    """

    model: str
    quant: str
    context: int
    users: int
    state: str
    detail: str
    stages: tuple[ServedStage, ...]
    live_caches: int
    lanes: int = 0
    kept_caches: int = 0
    kept_bytes: int = 0
    ring_s: float = 0.0
    cause: str = ""
    progress: float | None = None


# Options whose field on the wire is not set to their value.
_APART = ("deadline", "tools", "template_arguments", "tool_choice", "on_status")
# Options that are fields of Reasoning, and their names there.
_NAMES = {"reasoning": "enabled", "reasoning_effort": "effort", "reasoning_tokens": "most_tokens"}


def request_to_wire(messages: Messages, options: Options) -> wire.GenerateRequest:
    """Raises InputError, naming the field, for what can't be asked."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}")
    request = prompt_to_wire(messages)
    request.tools.extend(tools_to_wire(options.get("tools") or ()))
    if (arguments := options.get("template_arguments")) is not None:
        request.template_arguments = object_to_json("template_arguments", arguments)
    if (choice := options.get("tool_choice")) is not None:
        request.tool_choice.CopyFrom(tool_choice_to_wire(choice))
    request.statuses = options.get("on_status") is not None
    for name, value in options.items():
        if value is None or name in _APART:
            continue
        target = _target(request, name)
        try:
            if name == "json_schema" and not isinstance(value, str):
                value = json.dumps(value)
            if name == "stop":
                request.stop.extend([value] if isinstance(value, str) else cast(list[str], value))
            elif name == "logit_bias":
                request.sampling.logit_bias.update(cast(Mapping[int, float], value))
            else:
                setattr(target, _NAMES.get(name, name), value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} can't be {value!r}") from error
    return request


def _target(request: wire.GenerateRequest, name: str) -> Any:
    """The message that has an option's field."""
    if name in _NAMES:
        return request.reasoning
    if name in wire.Sampling.DESCRIPTOR.fields_by_name:
        return request.sampling
    return request.constraint if name in wire.Constraint.DESCRIPTOR.fields_by_name else request


def deadline_of(options: Options) -> float | None:
    """The seconds an answer may take; None: as long as it takes."""
    deadline = options.get("deadline")
    if deadline is not None and not (deadline > 0 and math.isfinite(deadline)):
        raise InputError(f"deadline can't be {deadline!r}: give seconds above 0")
    return deadline


def event_from_wire(event: wire.GenerateEvent) -> Event:
    kind = event.WhichOneof("event")
    if kind == "delta":
        delta = event.delta
        return Delta(
            text=delta.text,
            reasoning=delta.reasoning,
            tool_call=delta.tool_call,
            calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in delta.calls),
            token_ids=tuple(delta.token_ids),
            logprobs=_logprobs_from_wire(delta.logprobs),
        )
    if kind == "finish":
        usage, timings = event.finish.usage, event.finish.timings
        return Finish(
            reason=event.finish.reason,
            usage=Usage(
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.drafted_tokens,
                usage.accepted_tokens,
            ),
            timings=Timings(
                timings.queue_s,
                timings.time_to_first_token_s,
                timings.decode_s,
                timings.tokens_per_s,
            ),
            trace=from_wire(event.finish.trace) if event.finish.HasField("trace") else None,
            stop_string=event.finish.stop_string,
        )
    raise UnavailableError(
        "the server sent an event that this client does not know: update unicluster here"
    )


def _logprobs_from_wire(logprobs: Iterable[wire.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(entry.token_id, entry.logprob, _logprobs_from_wire(entry.top), entry.text)
        for entry in logprobs
    )


def info_from_wire(info: wire.ChatInfo) -> ChatInfo:
    return ChatInfo(
        model=info.model,
        quant=info.quant,
        context=info.context,
        users=info.users,
        state=info.state,
        detail=info.detail,
        stages=tuple(
            ServedStage(
                stage.node,
                stage.first_layer,
                stage.end_layer,
                stage.weight_bytes,
                stage.engine or "mlx",
                stage.address,
            )
            for stage in info.stages
        ),
        live_caches=info.live_caches,
        lanes=info.lanes,
        kept_caches=info.kept_caches,
        kept_bytes=info.kept_bytes,
        ring_s=info.ring_s,
        cause=info.cause,
        progress=info.progress if info.HasField("progress") else None,
    )


def collect(events: Iterable[Event]) -> Answer:
    """The whole answer, from all its events. Raises ValueError where the Finish is missing."""
    pieces: list[Delta] = []
    finish: Finish | None = None
    reasoned = ReasoningTokens()
    for event in events:
        if isinstance(event, Finish):
            finish = event
        else:
            pieces.append(event)
            reasoned.add(event)
    if finish is None:
        raise ValueError("an answer needs its Finish")
    return Answer(
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(piece.tool_call for piece in pieces if piece.tool_call),
        finish_reason=finish.reason,
        usage=finish.usage,
        timings=finish.timings,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        trace=finish.trace,
        calls=tuple(call for piece in pieces for call in piece.calls),
        stop_string=finish.stop_string,
        reasoning_tokens=reasoned.count,
    )
