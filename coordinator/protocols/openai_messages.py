"""Messages of OpenAI's chat completions, with the calls of tools that they made."""

from collections.abc import Sequence
from typing import Any

from coordinator.protocols.fields import Fields, brief, clean
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Message, ToolCall

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(items: Sequence[Any], path: str = "messages", first: int = 0) -> list[Message]:
    """Messages of a conversation. Raises InputError that begins with a message's path.

    first: the number of the first one in the list at `path`.
    """
    if not items:
        raise InputError(f"{path}: must not be empty")
    return [_message(Fields(item, f"{path}[{at}]")) for at, item in enumerate(items, first)]


def _message(fields: Fields) -> Message:
    fields.choice("type", ("message",))
    role = fields.choice("role", ROLES)
    if role is None:
        raise InputError(f"{fields.path('role')}: missing")
    fields.refuse({"audio": "the model reads text", "function_call": "use tool_calls"})
    fields.accept("refusal", "annotations", "id", "status")
    message = Message(role=ROLES[role], name=fields.text("name") or "")
    if role == "assistant":
        _read_turn(fields, message)
    elif role == "tool":
        message.tool_call_id = fields.text("tool_call_id") or ""
    if "content" in fields or not message.tool_calls:
        message.content = content_text(fields.take("content"), fields.path("content"))
    fields.done()
    return message


def _read_turn(fields: Fields, message: Message) -> None:
    """Reads what an assistant's message has beside its content."""
    for name in ("reasoning_content", "reasoning"):
        message.reasoning_content += fields.text(name) or ""
    for at, item in enumerate(fields.items("tool_calls") or []):
        call = Fields(item, f"{fields.path('tool_calls')}[{at}]")
        call.choice("type", ("function",))
        call.accept("index")
        function = call.object("function")
        if function is None:
            raise InputError(f"{call.path('function')}: missing")
        made = ToolCall(id=call.text("id") or "", name=function.needed_text("name"))
        made.arguments = function.text("arguments") or ""
        function.done()
        call.done()
        message.tool_calls.append(made)


def content_text(content: Any, path: str) -> str:
    """A content, which is a text or a list of text parts, as one text."""
    if isinstance(content, str):
        return clean(content, path)
    if content is None:
        raise InputError(f"{path}: missing")
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a text or a list of parts, got {brief(content)}")
    parts = [Fields(part, f"{path}[{at}]") for at, part in enumerate(content)]
    return "\n".join(_part_text(part) for part in parts)


def _part_text(part: Fields) -> str:
    kind = part.text("type")
    if kind not in TEXT_PARTS:
        raise InputError(
            f"{part.path('type')}: {brief(kind)} is not supported here: the model reads text"
        )
    text = part.needed_text("text")
    part.accept("annotations", "cache_control", "logprobs")
    part.done()
    return text
