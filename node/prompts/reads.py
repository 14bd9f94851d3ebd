"""Messages and tools for a chat template, which remember what of them it has read.

A template that never looks at a field leaves it out of the prompt: whoever sent it should know.
"""

import json
from collections.abc import Iterator
from typing import Any


class Recorded(dict[str, Any]):
    """A dictionary that remembers the keys whose values were read. Whoever reads all of it, as a
    loop or a conversion to JSON does, has read each.
    """

    __slots__ = ("_read",)

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self._read.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    def copy(self) -> "Recorded":
        copy = Recorded({})
        dict.update(copy, self)
        copy._read = self._read
        return copy

    __copy__ = copy

    def __repr__(self) -> str:
        return repr(dict(self))

    __str__ = __repr__


class Arguments(dict[str, Any]):
    """Arguments of a call. Templates expect an object, or the JSON text of one: this is both."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: Any) -> str:
        return str(self) + str(other)

    def __radd__(self, other: Any) -> str:
        return str(other) + str(self)


def was_read(record: dict[str, Any], *keys: str) -> bool:
    """Whether one of `keys` was."""
    return isinstance(record, Recorded) and not record._read.isdisjoint(keys)


def recorded_message(message: dict[str, Any]) -> Recorded:
    """A message with recorded calls, whose reasoning has both names that templates know."""
    values = dict(message)
    if (reasoning := values.get("reasoning_content")) is not None:
        values = {"thinking": reasoning, **values}  # in transformers' order
    if calls := values.get("tool_calls"):
        values["tool_calls"] = [_recorded_call(call) for call in calls]
    return Recorded(values)


def recorded_tool(tool: dict[str, Any]) -> Recorded:
    return Recorded({**tool, "function": Recorded(tool["function"])})


def unread_fields(message: Recorded) -> list[str]:
    """Fields of a message that have a value which was not read."""
    values = dict.items(message)
    unread = [key for key, value in values if value and not was_read(message, key, *_others(key))]
    calls = dict.get(message, "tool_calls") or []
    if "tool_calls" not in unread and not all(map(_call_was_read, calls)):
        unread.append("tool_calls")
    return [key for key in unread if key not in ("role", "thinking")]


def tool_was_read(tool: Recorded) -> bool:
    return was_read(dict.__getitem__(tool, "function"), "name")


def name_of(tool: Recorded) -> str:
    """A tool's name, without reading it as a template does."""
    return str(dict.__getitem__(dict.__getitem__(tool, "function"), "name"))


def _others(key: str) -> tuple[str, ...]:
    return ("thinking",) if key == "reasoning_content" else ()


def _recorded_call(call: dict[str, Any]) -> Recorded:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, dict):
        arguments = Arguments(arguments)
    return Recorded({**call, "function": Recorded({**function, "arguments": arguments})})


def _call_was_read(call: Recorded) -> bool:
    function = dict.__getitem__(call, "function")
    empty = not dict.__getitem__(function, "arguments")
    return was_read(function, "name") and (empty or was_read(function, "arguments"))
