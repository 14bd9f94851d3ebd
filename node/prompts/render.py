"""Renders chat templates: `python -m node.prompts.render`, a process with limits.

A template is code that comes with a model's files. jinja's sandbox keeps it from the machine, but
not from looping for ever, nor from one `'a' * 10**12`, a single call of C that no thread and no
count of loops can interrupt. So it runs in this process, which the kernel ends: after CPU_SECONDS
for one prompt, or at MOST_MEMORY. Whoever asks kills it after a deadline, or when its client goes.

The process forks a child for each prompt. A child reads a request from its connection and answers
it: JSON, with its length in four bytes before it. A request has `template`, `messages`, `tools`,
the variables `variables` (the model's), `arguments` (the asker's) and `wishes` (by name: variables
that are set where the template has them), and `most_characters`. An answer has `text`, the names of
the wishes that were `granted` and, of the conversation, what the template did not use (see
`conversation.Unread`), or `error`.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any, Protocol

from jinja2 import Template, meta, nodes

from node.prompts.compat import compiled
from node.prompts.reads import (
    name_of,
    recorded_message,
    recorded_tool,
    tool_was_read,
    unread_fields,
)


class Stream(Protocol):
    """A binary stream both ways."""

    def read(self, size: int, /) -> bytes: ...
    def write(self, data: bytes, /) -> int | None: ...
    def flush(self) -> None: ...


# Real templates take milliseconds, also for conversations of megabytes.
CPU_SECONDS = 3.0
# Of address space: the process itself has a quarter of that.
MOST_MEMORY = 1 << 30
LENGTH = struct.Struct("<I")
# Variables of every template that are not of its environment or its model's tokenizer.
CONVERSATION = {"messages", "tools", "add_generation_prompt"}
# The model's variables that an asker may set.
ARGUMENTS = {"enable_thinking"}
REASONING = {"reasoning_content", "thinking"}


def write(stream: Stream, message: dict[str, Any]) -> None:
    """Sends one message."""
    data = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read(stream: Stream, most: int = 1 << 31) -> dict[str, Any] | None:
    """The next message; None where the stream has ended, or one is longer than `most` bytes."""
    prefix = stream.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(prefix)
    data = stream.read(length) if length <= most else b""
    if len(data) < length:
        return None
    message: dict[str, Any] = json.loads(data)
    return message


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text of a rendered template and what it did not use, or why there is none."""
    try:
        template = compiled(request["template"])
        answered = _rendered(template, request)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template is the model's own code and may raise anything
        return {"error": f"{error}"[:1000] or type(error).__name__}
    most = request["most_characters"]
    if len(answered["text"]) > most:
        characters = len(answered["text"])
        return {"error": f"it makes {characters} characters of them, and at most {most}"}
    return answered


def _rendered(template: Template, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. Beside calls of tools, no content is written as an empty one, which
    nearly all templates take, or else as none, by which some know a message of calls.
    """
    try:
        answered = _render(template, request)
        if all(name != "tool_calls" for _, name in answered["unread"]["fields"]):
            return answered
    except Exception:
        if not (without := _without_content(request)):
            raise
        return _render(template, without)
    if without := _without_content(request):
        with contextlib.suppress(Exception):  # the first way is as good then
            return _render(template, without)
    return answered


def _without_content(request: dict[str, Any]) -> dict[str, Any] | None:
    """The request without empty contents beside calls; None if there is none."""
    messages = request["messages"]
    bare = [bool(each.get("tool_calls")) and not each["content"] for each in messages]
    if not any(bare):
        return None
    without = [{**m, "content": None} if b else m for m, b in zip(messages, bare, strict=True)]
    return {**request, "messages": without}


def _render(template: Template, request: dict[str, Any]) -> dict[str, Any]:
    messages = [recorded_message(message) for message in request["messages"]]
    tools = request["tools"] and [recorded_tool(tool) for tool in request["tools"]]
    parsed = template.environment.parse(request["template"])
    variables = meta.find_undeclared_variables(parsed)
    reserved, unused = _not_taken(request, template, variables)
    wished = {
        name: {variable: value for variable, value in wish.items() if variable in variables}
        for name, wish in request["wishes"].items()
    }
    wishes = {variable: value for wish in wished.values() for variable, value in wish.items()}
    text = ""
    if not reserved and not unused:
        text = template.render(
            **{"documents": None, **request["variables"], **wishes, **request["arguments"]},
            messages=messages,
            tools=tools,
            add_generation_prompt=True,
        )
    fields = [(index, name) for index, each in enumerate(messages) for name in unread_fields(each)]
    if any(name == "reasoning_content" for _, name in fields) and _mentions(parsed, REASONING):
        # Templates that know of reasoning leave out that of earlier turns.
        fields = [(index, name) for index, name in fields if name != "reasoning_content"]
    names = [name_of(tool) for tool in tools or () if not tool_was_read(tool)]
    unread = {"fields": fields, "tools": names, "arguments": unused, "reserved": reserved}
    granted = [name for name, wish in wished.items() if wish]
    return {"text": text, "unread": unread, "granted": granted}


def _not_taken(
    request: dict[str, Any], template: Template, variables: set[str]
) -> tuple[list[str], list[str]]:
    """Template arguments that the template has from elsewhere, and those that it has no use for."""
    arguments = request["arguments"].keys()
    models = request["variables"].keys() - ARGUMENTS
    reserved = arguments & (CONVERSATION | template.environment.globals.keys() | models)
    return sorted(reserved), sorted(arguments - variables)


def _mentions(parsed: nodes.Template, names: set[str]) -> bool:
    attributes = {each.attr for each in parsed.find_all(nodes.Getattr)}
    constants = {each.value for each in parsed.find_all(nodes.Const) if type(each.value) is str}
    return not names.isdisjoint(attributes | constants)


def main() -> None:
    """Forks a child for each connection that comes over standard input, which is a socket.

    So that a child, which may have to be ended, costs milliseconds and not a second of imports.
    """
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as control:
        while True:
            _, received, _, _ = socket.recv_fds(control, 1, 1)
            if not received:
                return
            child = os.fork()
            with socket.socket(fileno=received[0]) as connection:
                if not child:
                    control.close()
                    _serve(connection)
                    os._exit(0)
                # The first message, for the child waits for a request.
                with contextlib.suppress(OSError):
                    connection.sendall(LENGTH.pack(child))


def _serve(connection: socket.socket) -> None:
    """Answers one request, within limits."""
    with connection.makefile("rwb") as stream:
        request = read(stream)
        if request is not None:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            answered = answer(request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write(stream, answered)


if __name__ == "__main__":
    main()
