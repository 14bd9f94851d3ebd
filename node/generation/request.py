"""From a GenerateRequest to what the engine runs: everything is checked here, by field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from node.generation.sampling import Sampling
from unicluster.errors import InputError, in_one_line
from unicluster.v1 import chat_pb2

ROLES = ("system", "user", "assistant", "tool")
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Job:
    """A checked request. `state` is where its text begins: "normal", "reasoning", ..."""

    tokens: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    logprobs: int | None
    state: str
    ignore_eos: bool = False
    no_reuse: bool = False
    trace: bool = False


def check_request(
    request: chat_pb2.GenerateRequest, tokenizer: Any, context: int, defaults: Sampling
) -> Job:
    """Raises InputError, which begins with the field's name, for what makes no sense."""
    sampling = defaults.updated(request.sampling)
    if request.HasField("logprobs") and request.logprobs > MAX_LOGPROBS:
        raise InputError(f"logprobs: must be at most {MAX_LOGPROBS}, got {request.logprobs}")
    if not all(request.stop):
        raise InputError("stop: must not contain an empty string")
    tokens = _prompt(request, tokenizer)
    field = "messages" if request.messages else "token_ids"
    if len(tokens) >= context:
        raise InputError(
            f"{field}: the prompt has {len(tokens)} tokens and the context is {context}"
        )
    return Job(
        tokens=tokens,
        max_tokens=_max_tokens(request, room=context - len(tokens)),
        sampling=sampling,
        stop=tuple(request.stop),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        state=_initial_state(tokens, tokenizer),
        ignore_eos=request.ignore_eos,
        no_reuse=request.no_reuse,
        trace=request.trace,
    )


def _prompt(request: chat_pb2.GenerateRequest, tokenizer: Any) -> list[int]:
    if request.messages and request.token_ids:
        raise InputError("messages: give either messages or token_ids, not both")
    if request.messages:
        return _render(request.messages, tokenizer)
    if not request.token_ids:
        raise InputError("messages: there are none, nor are there token_ids")
    vocabulary = len(tokenizer)
    for token in request.token_ids:
        if token >= vocabulary:
            raise InputError(f"token_ids: {token} is not in the vocabulary of {vocabulary} tokens")
    return list(request.token_ids)


def _render(messages: Sequence[chat_pb2.Message], tokenizer: Any) -> list[int]:
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise InputError(
                f"messages: the role of message {number} must be one of {', '.join(ROLES)}, "
                f"got {message.role!r}"
            )
    last = messages[-1]
    if last.role in ("system", "user") and not last.content.strip():
        raise InputError("messages: the prompt is empty")
    if not tokenizer.has_chat_template:
        raise InputError("messages: this model has no chat template: send token_ids instead")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    except Exception as error:  # a template is the model's own code and may raise anything
        reason = in_one_line(error)
        raise InputError(f"messages: the model's chat template refuses them: {reason}") from error
    if not tokens:
        raise InputError("messages: the prompt is empty")
    return list(tokens)


def _max_tokens(request: chat_pb2.GenerateRequest, room: int) -> int:
    if not request.HasField("max_tokens"):
        return room
    if request.max_tokens == 0:
        raise InputError("max_tokens: must be at least 1, got 0")
    if request.max_tokens > room:
        raise InputError(
            f"max_tokens: the context has room for {room} after the prompt, "
            f"got {request.max_tokens}"
        )
    return request.max_tokens


def _initial_state(tokens: list[int], tokenizer: Any) -> str:
    """Some templates open the reasoning themselves: then the answer begins inside it."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    if tokenizer.has_thinking:
        begun = tokenizer.rfind_think_start(tokens)
        if begun > tokenizer.rfind_think_end(tokens):
            return "reasoning"
    return "normal"
