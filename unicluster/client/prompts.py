"""Prompts, conversations and tools of a chat, as Python values, and their form on the wire."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from unicluster.chat_limits import ROLES
from unicluster.errors import InputError
from unicluster.v1 import chat_pb2 as wire

Messages = str | Iterable[Mapping[str, Any]] | Sequence[int]
"""A prompt, or a conversation of messages, oldest first, or token ids.

A message is {"role": ..., "content": ...}. An assistant's may have "reasoning_content" and
"tool_calls", each {"id": ..., "name": ..., "arguments": ...} or as in OpenAI's API; a tool's may
have the "tool_call_id" that it answers, and any a "name". A value of None counts as absent.
"""

_TEXTS = ("role", "content", "tool_call_id", "name", "reasoning_content")


def prompt_to_wire(messages: Messages) -> wire.GenerateRequest:
    """A request with a prompt alone. Raises InputError, naming the field, for what is none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    items = list(messages)
    if items and all(isinstance(item, int) for item in items):
        try:
            return wire.GenerateRequest(token_ids=cast(list[int], items))
        except ValueError as error:
            raise InputError(f"the prompt's token ids can't be right: {error}") from error
    result = [
        _message_to_wire(f"messages[{index}]", cast(Mapping[str, Any], item))
        for index, item in enumerate(items)
    ]
    if not result or (result[-1].role in ("system", "user") and not result[-1].content.strip()):
        raise InputError("the prompt is empty: say something to answer")
    return wire.GenerateRequest(messages=result)


def tools_to_wire(tools: Iterable[Mapping[str, Any]]) -> list[wire.Tool]:
    """Functions that a model may call: {"name": ..., "description": ..., "parameters": ...}, the
    last a JSON schema, which calls always match where "strict" is true; or as in OpenAI's API.
    Raises InputError, naming the field.
    """
    return [_tool_to_wire(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def object_to_json(where: str, value: Any) -> str:
    """The JSON text of an object, or `value` if it is text. Raises InputError for another one."""
    if isinstance(value, str):
        return value
    try:
        if not isinstance(value, Mapping):
            raise TypeError("it is neither a dict nor text")
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} must be an object of JSON: {error}") from error
    return text


def _message_to_wire(where: str, message: Mapping[str, Any]) -> wire.Message:
    fields = _fields(where, message, (*_TEXTS, "tool_calls"))
    calls = [
        _call_to_wire(f"{where}.tool_calls[{index}]", call)
        for index, call in enumerate(_list(f"{where}.tool_calls", fields.get("tool_calls")))
    ]
    texts = {name: fields[name] for name in _TEXTS if name in fields}
    if "role" not in texts or ("content" not in texts and not calls):
        raise InputError(f"{where} must be a role and a content, both text: got {message!r}")
    _all_text(where, texts)
    if texts["role"] not in ROLES:
        raise InputError(f"{where}.role can't be {texts['role']!r}: use {', '.join(ROLES)}")
    return wire.Message(**texts, tool_calls=calls)


def _call_to_wire(where: str, call: Any) -> wire.ToolCall:
    fields = _flat(where, call, ("id", "name", "arguments"))
    arguments = object_to_json(f"{where}.arguments", fields.pop("arguments", ""))
    _all_text(where, fields)
    return wire.ToolCall(**fields, arguments=arguments)


def _tool_to_wire(where: str, tool: Any) -> wire.Tool:
    fields = _flat(where, tool, ("name", "description", "parameters", "strict"))
    parameters = object_to_json(f"{where}.parameters", fields.pop("parameters", ""))
    strict = fields.pop("strict", False)
    if not isinstance(strict, bool):
        raise InputError(f"{where}.strict must be true or false: got {strict!r}")
    _all_text(where, fields)
    return wire.Tool(**fields, parameters=parameters, strict=strict)


def tool_choice_to_wire(choice: str) -> wire.ToolChoice:
    """From "auto", "none", "required" or the name of a tool that must be called."""
    match choice:
        case "auto":
            return wire.ToolChoice()
        case "none":
            return wire.ToolChoice(none=True)
        case "required":
            return wire.ToolChoice(required=True)
    return wire.ToolChoice(name=choice)


def _flat(where: str, value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a call or tool. OpenAI's have some of them in "function", and a "type"."""
    outer = _fields(where, value, (*names, "type", "function"))
    if "type" in outer and outer.pop("type") != "function":
        raise InputError(f"{where}.type can't be {value['type']!r}: use 'function'")
    if "function" not in outer:
        return outer
    inner = _fields(
        f"{where}.function", outer.pop("function"), tuple(n for n in names if n != "id")
    )
    if twice := outer.keys() & inner.keys():
        raise InputError(f"{where}.{min(twice)} is there twice, also in its function")
    return outer | inner


def _fields(where: str, value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a dict that are not None. Raises InputError for unknown ones."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a dict: got {value!r}")
    if unknown := [key for key in value if key not in names]:
        raise InputError(f"{where} can't have {unknown[0]!r}: use {', '.join(names)}")
    return {key: item for key, item in value.items() if item is not None}


def _list(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{where} must be a list: got {value!r}")
    return list(value)


def _all_text(where: str, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise InputError(f"{where}.{name} must be text: got {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}.{name} must be text of Unicode: {error}") from error
