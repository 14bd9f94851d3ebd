"""Chat formats that are written in Python, in mlx-lm or in a tokenizer's class."""

import inspect
from typing import Any

from node.prompts.conversation import Unread, conversation_of
from node.prompts.reads import (
    name_of,
    recorded_message,
    recorded_tool,
    tool_was_read,
    unread_fields,
)
from unicluster.v1.chat_pb2 import GenerateRequest


def written_prompt(tokenizer: Any, request: GenerateRequest) -> tuple[list[int], set[str]]:
    """Token ids of a request's conversation by such a format, and the wishes that it has granted.

    Raises what the format raises, and InputError where it leaves out a part of the conversation.
    """
    # mlx-lm's take the arguments of calls as OpenAI's API has them: as text.
    mlx_lm = getattr(tokenizer, "_chat_template", None)
    conversation = conversation_of(request, arguments_as_text=mlx_lm is not None)
    written = mlx_lm or type(getattr(tokenizer, "_tokenizer", tokenizer)).apply_chat_template
    taken = inspect.signature(written).parameters.keys()
    unused = sorted(conversation.arguments.keys() - taken - {"enable_thinking"})
    conversation.refuse_unread(Unread(arguments=unused))
    messages = [recorded_message(message) for message in conversation.messages]
    tools = [recorded_tool(tool) for tool in conversation.tools or ()]
    wished = {
        variable: value
        for wish in conversation.wishes.values()
        for variable, value in wish.items()
        if variable in taken
    }
    options = {**wished, **conversation.arguments, **({"tools": tools} if tools else {})}
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    fields = [(index, name) for index, each in enumerate(messages) for name in unread_fields(each)]
    names = [name_of(tool) for tool in tools if not tool_was_read(tool)]
    conversation.refuse_unread(Unread(fields=fields, tools=names))
    granted = {name for name, wish in conversation.wishes.items() if wish.keys() & wished.keys()}
    return list(tokens), granted
