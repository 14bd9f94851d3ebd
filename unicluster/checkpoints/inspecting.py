"""Asking the inspecting program for layouts: MLX stays in that short-lived process.

`program` is its module; requests and answers go over its pipes, each with its length before it.
"""

import asyncio
import io
import re
import signal
import subprocess
from collections.abc import Sequence

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from unicluster.errors import InputError, UnavailableError, printable, shortened
from unicluster.program import child_environment, module_command
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

# The first layout takes seconds, most of them imports; each after it less.
DEADLINE_S = 300.0
# llama.cpp that fails a check of its own says which, and then has a debugger print pages.
SHORT_WORDS = {"GGML_NO_BACKTRACE": "1"}
# Ends at the limits that the program has set itself: the kernel's, or want of memory in a library.
LIMITS = (signal.SIGXCPU, signal.SIGKILL)
NO_MEMORY = re.compile(r"bad_alloc|alloc\w* failed|unable to allocate|out of memory", re.IGNORECASE)
# Names of folders in a line of a library, before a file's own.
_FOLDERS = re.compile(r"(?<!\S)/(?:[^/\s]+/)+")


async def inspect(
    program: str, request: InspectRequest, *, deadline_s: float = DEADLINE_S
) -> ModelLayout:
    """The layout of a model on this machine, or of a config.json in the request.

    The program is killed when this is cancelled. Raises InputError with its one-line reason,
    UnavailableError after `deadline_s` seconds.
    """
    child = await asyncio.create_subprocess_exec(
        *module_command(program),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(SHORT_WORDS),
    )
    try:
        async with asyncio.timeout(deadline_s):
            out, err = await child.communicate(_encoded([request]))
    except TimeoutError as error:
        raise _too_late(request, deadline_s) from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    (layout,) = _answers([request], child.returncode or 0, out, err)
    return layout


def inspect_configs(
    program: str, requests: Sequence[InspectRequest], *, deadline_s: float = DEADLINE_S
) -> list[ModelLayout]:
    """Layouts from configurations alone; blocks.

    A request without a config.json names a directory, a hub repository, or the demo to take it
    from, or the file of a GGUF. Raises as `inspect` does.
    """
    if not requests:
        return []
    try:
        child = subprocess.run(
            module_command(program, "--configs"),
            input=_encoded(requests),
            capture_output=True,
            timeout=deadline_s,
            env=child_environment(SHORT_WORDS),
        )
    except subprocess.TimeoutExpired as error:
        raise _too_late(requests[0], deadline_s) from error
    return _answers(requests, child.returncode, child.stdout, child.stderr)


def _encoded(requests: Sequence[InspectRequest]) -> bytes:
    stream = io.BytesIO()
    for request in requests:
        serialize_length_prefixed(request, stream)
    return stream.getvalue()


def _answers(
    requests: Sequence[InspectRequest], code: int, out: bytes, err: bytes
) -> list[ModelLayout]:
    lines = err.decode(errors="replace").strip().splitlines()
    if code < 0:
        raise InputError(f"{requests[0].model}: {_why_killed(signal.Signals(-code), lines)}")
    if code != 0:
        raise InputError(lines[-1] if lines else f"{requests[0].model}: can't be inspected")
    stream = io.BytesIO(out)
    layouts = [parse_length_prefixed(ModelLayout, stream) for _ in requests]
    return [layout for layout in layouts if layout is not None]


def _why_killed(by: signal.Signals, lines: Sequence[str]) -> str:
    """Why the program was ended by a signal, after its last line: libraries abort for a check that
    fails, or for want of memory.
    """
    last = _FOLDERS.sub("", lines[-1]) if lines else ""
    if by in LIMITS or NO_MEMORY.search(last):
        return f"can't be inspected within the limits of time and memory ({by.name})"
    words = f": {shortened(printable(last))}" if last else ""
    return (
        f"inspecting it crashed ({by.name}{words}): it is damaged, or made otherwise than its kind "
        "of model is; copy it again"
    )


def _too_late(request: InspectRequest, seconds: float) -> UnavailableError:
    reason = f"no answer after {seconds:.0f} s: this machine is too busy, try again"
    return UnavailableError(f"{request.model}: {reason}")
