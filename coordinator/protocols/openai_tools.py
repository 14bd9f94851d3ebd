"""Tools of OpenAI's chat completions, and the calls in an answer."""

from collections.abc import Iterable

from coordinator.protocols.asked import Json
from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_strict import check_strict
from unicluster.client.answers import ToolCall
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest, Tool
from unicluster.v1.chat_pb2 import ToolCall as WireCall


def read_tools(fields: Fields, request: GenerateRequest) -> None:
    """Puts tools, and whether and which of them must be called, into the request."""
    for at, item in enumerate(fields.items("tools") or []):
        request.tools.append(_tool(Fields(item, f"{fields.path('tools')}[{at}]")))
    _read_choice(fields, request)
    parallel = fields.choice("parallel_tool_calls", (True, False))
    request.single_tool_call = parallel is False and bool(request.tools)


def _tool(fields: Fields) -> Tool:
    fields.choice("type", ("function",))
    function = fields.object("function")
    if function is None:
        raise InputError(f"{fields.path('function')}: missing")
    fields.done()
    return read_function(function)


def read_function(function: Fields) -> Tool:
    """A function's name, description, schema of parameters, and whether it is strict."""
    tool = Tool(name=function.needed_text("name"), strict=function.flag("strict"))
    tool.description = function.text("description") or ""
    if (parameters := function.object("parameters")) is not None:
        tool.parameters = parameters.as_json()
        if tool.strict:
            check_strict(parameters.values, function.path("parameters"))
    function.done()
    return tool


def _read_choice(fields: Fields, request: GenerateRequest) -> None:
    choice, path = fields.take("tool_choice"), fields.path("tool_choice")
    if isinstance(choice, dict):
        request.tool_choice.name = _named(Fields(choice, path))
    elif choice == "required":
        request.tool_choice.required = True
    elif choice == "none":
        if request.tools:
            request.tool_choice.none = True
    elif choice not in (None, "auto"):
        raise InputError(f"{path}: must be none, auto, required, or a function to call")


def _named(choice: Fields) -> str:
    choice.choice("type", ("function",))
    function = choice.object("function")
    if function is None:
        raise InputError(f"{choice.path('function')}: missing")
    name = function.needed_text("name")
    function.done()
    choice.done()
    return name


def calls_json(calls: Iterable[ToolCall | WireCall]) -> list[Json]:
    """Calls as a message has them."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def calls_delta(calls: Iterable[WireCall], first: int) -> list[Json]:
    """Calls as a chunk has them; `first` is the number of the first among the answer's."""
    return [{"index": first + at, **call} for at, call in enumerate(calls_json(calls))]
