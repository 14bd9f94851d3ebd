"""A request's messages and tools as chat templates take them, and whether they were all used."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from node.prompts.thinking import Wishes, wishes_of
from unicluster.errors import InputError, shown
from unicluster.json_text import parse_object
from unicluster.v1.chat_pb2 import GenerateRequest, Message, Tool, ToolCall

NO_PARAMETERS = '{"type": "object", "properties": {}}'


@dataclass(frozen=True)
class Unread:
    """Parts of a conversation that a template did not use.

    `fields`: (index of a message, field); `tools`: names; `arguments`: names of template
    arguments; `reserved`: those of them that the template has from elsewhere.
    """

    fields: Sequence[tuple[int, str]] = ()
    tools: Sequence[str] = ()
    arguments: Sequence[str] = ()
    reserved: Sequence[str] = ()


@dataclass
class Conversation:
    """`messages` and `tools` in the form of Hugging Face's templates; `arguments` are further
    variables of the template. `numbers`: of each message in the request, from 1, where that is not
    its place here.

    `implied`: fields, as those of Unread, that say no more than the order of the messages does.
    `wishes`: variables that are set where the template has them, by a name, and `granted` the names
    of those that it has, once it was rendered.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    implied: set[tuple[int, str]] = field(default_factory=set)
    wishes: Wishes = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    def refuse_unread(self, unread: Unread) -> None:
        """Raises InputError, which begins with the field's name, where something is left out of
        the prompt that somebody sent.
        """
        for name in unread.reserved:
            raise InputError(f"template_arguments: {shown(name)} is the chat template's already")
        for name in unread.arguments:
            raise InputError(
                f"template_arguments: the model's chat template does not use {shown(name)}"
            )
        for name in unread.tools:
            raise InputError(f"tools: the model's chat template does not use {shown(name)} here")
        for index, name in unread.fields:
            if (index, name) not in self.implied:
                number = self.numbers[index] if self.numbers else index + 1
                raise InputError(_unused(number, name))


def conversation_of(request: GenerateRequest, *, arguments_as_text: bool = False) -> Conversation:
    """The conversation of a request whose limits were checked. Results of tools are put in the
    order of their calls, which is all that many templates know of them.

    `arguments_as_text`: arguments of calls stay JSON text, instead of the object that it is of.
    Raises InputError, which begins with the field's name, for JSON that is no object.
    """
    conversation = Conversation([], wishes=wishes_of(request))
    for number, message in _in_order(request.messages, conversation.implied):
        conversation.numbers.append(number)
        conversation.messages.append(_plain(number, message, arguments_as_text))
    if offers_tools(request):
        conversation.tools = [_plain_tool(tool) for tool in request.tools]
    conversation.arguments = parse_object("template_arguments: they", request.template_arguments)
    return conversation


def offers_tools(request: GenerateRequest) -> bool:
    """Whether the model may call tools, and so learns of them."""
    return bool(request.tools) and not request.tool_choice.none


def _unused(number: int, name: str) -> str:
    unused = f"messages: the {name} of message {number}: the model's chat template does not use it"
    if name == "tool_call_id":
        unused += ", so all results must follow their calls, and none of another"
    return unused


def _plain(number: int, message: Message, arguments_as_text: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("tool_call_id", "name", "reasoning_content"):
        if value := getattr(message, name):
            plain[name] = value
    if message.tool_calls:
        where = f"messages: the arguments of a call in message {number}"
        plain["tool_calls"] = [
            _plain_call(call, parse_object(where, call.arguments), arguments_as_text)
            for call in message.tool_calls
        ]
    return plain


def _plain_call(call: ToolCall, arguments: dict[str, Any], as_text: bool) -> dict[str, Any]:
    passed = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    plain = {"type": "function", "function": {"name": call.name, "arguments": passed}}
    return {"id": call.id, **plain} if call.id else plain


def _plain_tool(tool: Tool) -> dict[str, Any]:
    parameters = parse_object(
        f"tools: the parameters of {shown(tool.name)}", tool.parameters or NO_PARAMETERS
    )
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _in_order(
    messages: Iterable[Message], implied: set[tuple[int, str]]
) -> list[tuple[int, Message]]:
    """Messages with their numbers. Adds to `implied` what the order of results says already."""
    ordered: list[tuple[int, Message]] = []
    calls: list[ToolCall] = []
    results: list[tuple[int, Message]] = []
    for number, message in enumerate(messages, start=1):
        if message.role == "tool":
            results.append((number, message))
            continue
        _add_results(ordered, calls, results, implied)
        calls, results = list(message.tool_calls), []
        ordered.append((number, message))
    _add_results(ordered, calls, results, implied)
    return ordered


def _add_results(
    ordered: list[tuple[int, Message]],
    calls: list[ToolCall],
    results: list[tuple[int, Message]],
    implied: set[tuple[int, str]],
) -> None:
    places = {call.id: place for place, call in enumerate(calls) if call.id}
    if all(message.tool_call_id in places for _, message in results):
        results = sorted(results, key=lambda result: places[result[1].tool_call_id])
    for place, (number, message) in enumerate(results):
        index = len(ordered)
        call = places.get(message.tool_call_id, place)
        if not message.name and call < len(calls):
            message = _named_by(message, calls[call])  # some templates know results by it alone
            implied.add((index, "name"))
        ordered.append((number, message))
        if place >= len(calls) or message.tool_call_id not in ("", calls[place].id):
            continue
        implied.add((index, "tool_call_id"))
        if message.name == calls[place].name:
            implied.add((index, "name"))


def _named_by(message: Message, call: ToolCall) -> Message:
    named = Message()
    named.CopyFrom(message)
    named.name = call.name
    return named
