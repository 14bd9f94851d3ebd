"""Renders chat templates: `python -m node.prompts.render`, a process with limits.

A template is code that comes with a model's files. jinja's sandbox keeps it from the machine, but
not from looping for ever, nor from one `'a' * 10**12`, a single call of C that no thread and no
count of loops can interrupt. So it runs in this process, which the kernel ends: after CPU_SECONDS
for one prompt, or at MOST_MEMORY. Whoever asks kills it after a deadline, or when its client goes.

Reads requests from standard input and answers each on standard output: JSON, with its length in
four bytes before it. A request has the arguments of transformers' render_jinja_template, and
`most_characters`; an answer has `text` or `error`. Ends with its input.
"""

import contextlib
import json
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from transformers.utils.chat_template_utils import render_jinja_template

# Real templates take milliseconds, also for conversations of megabytes.
CPU_SECONDS = 3.0
# Of address space: the process itself has a quarter of that.
MOST_MEMORY = 1 << 30
LENGTH = struct.Struct("<I")


def write(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Sends one message."""
    data = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read(stream: BinaryIO, most: int = 1 << 31) -> dict[str, Any] | None:
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
    """The text of a rendered template, or why there is none."""
    most = request.pop("most_characters")
    try:
        # (texts, indexes), whatever its annotation says
        rendered: Any = render_jinja_template(**request)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template is the model's own code and may raise anything
        return {"error": f"{error}"[:1000] or type(error).__name__}
    text = rendered[0][0]  # of one conversation
    if len(text) > most:
        return {"error": f"it makes {len(text)} characters of them, and at most {most}"}
    return {"text": text}


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    while (request := read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answered = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(out, answered)


if __name__ == "__main__":
    main()
