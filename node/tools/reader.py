"""Reads the calls in an answer: from a model's text to names and arguments."""

import json
import secrets
from collections.abc import Iterable
from typing import Any

from node.tools.call_format import CallFormat
from unicluster.v1.chat_pb2 import GenerateEvent, Tool, ToolCall

# Longer texts stay unread: the formats' expressions take time by the square of it.
MOST_CHARACTERS = 256 << 10
MOST_CALLS = 128
ID_BYTES = 12


class CallReader:
    """Reads the calls of one answer to a request with `tools`. Keep it to one thread at a time."""

    def __init__(self, calls: CallFormat, tools: Iterable[Tool], *, single: bool = False) -> None:
        """`single`: no more than the answer's first call."""
        self._format = calls
        self._single = single
        self._count = 0
        self._tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters or "{}"),
                },
            }
            for tool in tools
        ]

    def read(self, event: GenerateEvent) -> None:
        """Replaces an event's raw text by the calls that it says, unless it says none.

        An answer that has made calls finishes with the reason tool_calls, or for its length.
        """
        if event.HasField("finish"):
            if self._count and event.finish.reason == "stop":
                event.finish.reason = "tool_calls"
        elif event.delta.tool_call:
            calls = self._parse(event.delta.tool_call)
            room = (1 if self._single else MOST_CALLS) - self._count
            event.delta.calls.extend(calls[: max(room, 0)])
            self._count += len(event.delta.calls)
            if calls:
                event.delta.tool_call = ""

    def _parse(self, text: str) -> list[ToolCall]:
        if len(text) > MOST_CHARACTERS:
            return []
        try:
            parsed = self._format.parse(text, self._tools)
            return [_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # a model may write anything, and a parser raise anything of it
            return []


def _call(parsed: dict[str, Any]) -> ToolCall:
    """Raises for what is no call: its name must be text, its arguments an object."""
    name, arguments = parsed["name"], parsed.get("arguments", parsed.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise TypeError("no call")
    number = parsed.get("id")
    if not isinstance(number, str) or not number:
        number = f"call_{secrets.token_hex(ID_BYTES)}"
    return ToolCall(id=number, name=name, arguments=json.dumps(arguments, ensure_ascii=False))
