"""Messages of Anthropic's API: their blocks as the gateway's messages."""

import json
from typing import Any

from coordinator.protocols.fields import Fields, brief, clean
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Message, ToolCall


def read_system(fields: Fields) -> list[Message]:
    """The system prompt, a text or a list of text blocks, as at most one message."""
    system = fields.take("system")
    text = "" if system is None else _text_of(system, fields.path("system"))
    return [Message(role="system", content=text)] if text else []


def read_conversation(items: list[Any], path: str = "messages") -> list[Message]:
    """Messages of a conversation. Raises InputError that begins with a message's path."""
    if not items:
        raise InputError(f"{path}: must not be empty")
    messages: list[Message] = []
    for at, item in enumerate(items):
        fields = Fields(item, f"{path}[{at}]")
        role = fields.choice("role", ("user", "assistant", "system"))  # also between turns
        if role is None:
            raise InputError(f"{fields.path('role')}: missing")
        content, where = fields.take("content"), fields.path("content")
        fields.done()
        if isinstance(content, str):
            messages.append(Message(role=role, content=clean(content, where)))
        elif isinstance(content, list):
            blocks = [Fields(block, f"{where}[{n}]") for n, block in enumerate(content)]
            messages += _said(role, blocks)
        else:
            raise InputError(f"{where}: must be a text or a list of blocks, got {brief(content)}")
    if messages[-1].role == "assistant":
        raise InputError(f"{path}: the last one must be the user's: no answer is gone on with")
    return messages


def _said(role: str, blocks: list[Fields]) -> list[Message]:
    if role == "user":
        return _user(blocks)
    if role == "assistant":
        return [_assistant(blocks)]
    texts = [_text(block.text("type"), block) for block in blocks]
    return [Message(role=role, content="\n".join(texts))]


def _user(blocks: list[Fields]) -> list[Message]:
    """Results of tools, each a message of its own, and the text after them."""
    messages, texts = [], []
    for block in blocks:
        kind = block.text("type")
        if kind == "tool_result":
            messages.append(_result(block))
        else:
            texts.append(_text(kind, block))
    if texts or not messages:
        messages.append(Message(role="user", content="\n".join(texts)))
    return messages


def _result(block: Fields) -> Message:
    content = block.take("content")
    text = "" if content is None else _text_of(content, block.path("content"))
    if block.flag("is_error"):
        text = f"Error: {text}"
    block.accept("cache_control")
    message = Message(role="tool", content=text, tool_call_id=block.needed_text("tool_use_id"))
    block.done()
    return message


def _assistant(blocks: list[Fields]) -> Message:
    message, texts, thoughts = Message(role="assistant"), [], []
    for block in blocks:
        kind = block.text("type")
        if kind == "tool_use":
            message.tool_calls.append(_call(block))
        elif kind == "thinking":
            thoughts.append(block.needed_text("thinking"))
            block.accept("signature", "cache_control")
            block.done()
        else:
            texts.append(_text(kind, block))
    message.content = "\n".join(texts)
    message.reasoning_content = "\n".join(thoughts)
    return message


def _call(block: Fields) -> ToolCall:
    call = ToolCall(id=block.needed_text("id"), name=block.needed_text("name"))
    arguments = block.object("input")
    call.arguments = arguments.as_json() if arguments is not None else "{}"
    block.choice("caller", ({"type": "direct"},))
    block.accept("cache_control")
    block.done()
    return call


def _text_of(content: Any, path: str) -> str:
    """A text, or a list of text blocks, as one text."""
    if isinstance(content, str):
        return clean(content, path)
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a text or a list of blocks, got {brief(content)}")
    blocks = [Fields(block, f"{path}[{at}]") for at, block in enumerate(content)]
    return "\n".join(_text(block.text("type"), block) for block in blocks)


def _text(kind: str | None, block: Fields) -> str:
    if kind != "text":
        raise InputError(
            f"{block.path('type')}: {brief(kind)} is not supported here: the model reads text"
        )
    text = block.needed_text("text")
    block.accept("cache_control", "citations")
    block.done()
    return text


def input_of(arguments: str) -> Any:
    """The input of a call, which the head has read as JSON of an object."""
    return json.loads(arguments or "{}")
