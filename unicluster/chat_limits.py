"""Limits of a chat request, field by field, that hold whatever the model is.

The gateway and the head both check them before they do anything with the request.
"""

from collections.abc import Iterable
from itertools import chain

from unicluster.errors import InputError, shown
from unicluster.v1.chat_pb2 import GenerateRequest, Message

MOST_MESSAGES = 4096
# UTF-8 of all that the chat template gets, together.
MOST_TEXT_BYTES = 12 << 20
# Of it, what is parsed as JSON: arguments of calls, parameters of tools, template arguments.
MOST_JSON_BYTES = 4 << 20
MOST_TOOL_CALLS = 128  # of a message
MOST_TOOLS = 512
# Names and ids of tools, calls and speakers.
MOST_NAME_CHARACTERS = 256
MOST_TOKENS = 1 << 20
MOST_STOP = 64
MOST_STOP_CHARACTERS = 512
MOST_LOGPROBS = 20
# Tokens with a bias, which is from minus to plus MOST_BIAS.
MOST_BIASES = 1024
MOST_BIAS = 100.0
NAME_CHARACTERS = 4096
# A schema, regex or grammar that the answer must match.
MOST_CONSTRAINT_BYTES = 256 << 10
ROLES = ("system", "user", "assistant", "tool")
# Fields of a message that messages of one role have.
ONLY_OF = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}


def check_limits(request: GenerateRequest) -> None:
    """Raises InputError, which begins with the field's name, for what no model takes."""
    _at_most("model", len(request.model), NAME_CHARACTERS, "characters")
    _at_most("messages", len(request.messages), MOST_MESSAGES, "messages")
    _at_most("tools", len(request.tools), MOST_TOOLS, "tools")
    field = "prompt" if request.prompt else "messages"
    _at_most(field, text_bytes(request), MOST_TEXT_BYTES, "bytes of text")
    for number, message in enumerate(request.messages, start=1):
        _check_message(number, message)
    _check_tools(request)
    _at_most("messages", json_bytes(request), MOST_JSON_BYTES, "bytes of JSON, tools included")
    _at_most("token_ids", len(request.token_ids), MOST_TOKENS, "tokens")
    _at_most("stop", len(request.stop), MOST_STOP, "strings")
    for stop in request.stop:
        if not stop:
            raise InputError("stop: must not contain an empty string")
        _at_most("stop", len(stop), MOST_STOP_CHARACTERS, "characters in a string")
    _at_most("constraint", request.constraint.ByteSize(), MOST_CONSTRAINT_BYTES, "bytes")
    if request.HasField("logprobs") and request.logprobs > MOST_LOGPROBS:
        raise InputError(f"logprobs: must be at most {MOST_LOGPROBS}, got {request.logprobs}")
    biases = request.sampling.logit_bias
    _at_most("logit_bias", len(biases), MOST_BIASES, "tokens")
    for bias in biases.values():
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise InputError(
                f"logit_bias: must be between {-MOST_BIAS:g} and {MOST_BIAS:g}, got {bias:g}"
            )
    _at_most("resume", len(request.resume.token_ids), MOST_TOKENS, "tokens")
    if request.HasField("resume") and not request.token_ids:
        raise InputError("resume: it goes with token_ids, which are the answer's prompt")
    _at_most("reasoning.effort", len(request.reasoning.effort), MOST_NAME_CHARACTERS, "characters")
    if request.HasField("max_tokens") and request.max_tokens == 0:
        raise InputError("max_tokens: must be at least 1, got 0")


def content_bytes(request: GenerateRequest) -> int:
    """Bytes of the prompt and of the contents of all messages, in UTF-8."""
    contents = (message.content for message in request.messages)
    return _bytes_of(chain([request.prompt], contents))


def text_bytes(request: GenerateRequest) -> int:
    """Bytes of all that the chat template gets, in UTF-8."""
    spoken = _bytes_of(
        getattr(message, field)
        for message in request.messages
        for field in ("name", "tool_call_id", "reasoning_content")
    )
    names = _bytes_of(
        text
        for message in request.messages
        for call in message.tool_calls
        for text in (call.id, call.name)
    )
    tools = _bytes_of(text for tool in request.tools for text in (tool.name, tool.description))
    return content_bytes(request) + spoken + names + tools + json_bytes(request)


def json_bytes(request: GenerateRequest) -> int:
    """Bytes of all JSON that the head parses for the chat template, in UTF-8."""
    arguments = (call.arguments for message in request.messages for call in message.tool_calls)
    parameters = (tool.parameters for tool in request.tools)
    return _bytes_of(chain(arguments, parameters, [request.template_arguments]))


def _bytes_of(texts: Iterable[str]) -> int:
    """Their bytes in UTF-8; of one text at a time, and without a copy of what is ASCII."""
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


def _check_message(number: int, message: Message) -> None:
    where = f"messages: the {{}} of message {number}"
    if message.role not in ROLES:
        raise InputError(
            f"{where.format('role')} must be one of {', '.join(ROLES)}, got {message.role[:40]!r}"
        )
    for field, role in ONLY_OF.items():
        if getattr(message, field) and message.role != role:
            raise InputError(
                f"{where.format(field)}: only messages of role {role} have one, "
                f"and this is of role {message.role}"
            )
    for field in ("name", "tool_call_id"):
        _short(where.format(field), getattr(message, field))
    calls = message.tool_calls
    _at_most(where.format("tool_calls"), len(calls), MOST_TOOL_CALLS, "calls")
    for call in calls:
        _named(where.format("tool_calls"), "call", call.name)
        _short(where.format("tool_calls"), call.id)
    ids = [call.id for call in calls if call.id]
    if len(set(ids)) < len(ids):
        raise InputError(f"{where.format('tool_calls')}: two of them have the same id")


def _check_tools(request: GenerateRequest) -> None:
    names = set()
    for tool in request.tools:
        _named("tools", "tool", tool.name)
        if tool.name in names:
            raise InputError(f"tools: two of them have the name {tool.name[:40]!r}")
        names.add(tool.name)
    choice = request.tool_choice.WhichOneof("kind")
    if choice is not None and not getattr(request.tool_choice, choice):
        raise InputError(f"tool_choice.{choice}: says nothing")
    if choice in ("required", "name") and not request.tools:
        raise InputError("tool_choice: there are no tools to call")
    if choice == "name" and request.tool_choice.name not in names:
        raise InputError(f"tool_choice: there is no tool {shown(request.tool_choice.name)}")
    if request.single_tool_call and not request.tools:
        raise InputError("single_tool_call: there are no tools to call")
    if request.HasField("resume"):
        return  # its token_ids were made of messages, perhaps
    for prompt in ("token_ids", "prompt"):
        for field in ("tools", "template_arguments"):
            if getattr(request, prompt) and getattr(request, field):
                raise InputError(f"{field}: they go with messages, and there is {prompt}")


def _named(where: str, thing: str, name: str) -> None:
    if not name.strip():
        raise InputError(f"{where}: a {thing} needs a name")
    _short(where, name)


def _short(where: str, text: str) -> None:
    _at_most(where, len(text), MOST_NAME_CHARACTERS, "characters in a name or id")


def _at_most(field: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise InputError(f"{field}: {count} {unit}, and at most {most}")
