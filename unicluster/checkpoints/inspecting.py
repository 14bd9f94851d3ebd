"""Asking the inspecting program for layouts: MLX stays in that short-lived process.

`program` is its module; requests and answers go over its pipes, each with its length before it.
"""

import asyncio
import io
import signal
import subprocess
from collections.abc import Sequence

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from unicluster.errors import InputError, UnavailableError
from unicluster.program import child_environment, module_command
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

# The first layout takes seconds, most of them imports; each after it less.
DEADLINE_S = 300.0


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
        env=child_environment(),
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
            env=child_environment(),
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
    if code < 0:  # the kernel's limits, or MLX's own way of running out of memory
        name = signal.Signals(-code).name
        reason = f"can't be inspected within the limits of time and memory ({name})"
        raise InputError(f"{requests[0].model}: {reason}")
    if code != 0:
        lines = err.decode(errors="replace").strip().splitlines()
        raise InputError(lines[-1] if lines else f"{requests[0].model}: can't be inspected")
    stream = io.BytesIO(out)
    layouts = [parse_length_prefixed(ModelLayout, stream) for _ in requests]
    return [layout for layout in layouts if layout is not None]


def _too_late(request: InspectRequest, seconds: float) -> UnavailableError:
    reason = f"no answer after {seconds:.0f} s: this machine is too busy, try again"
    return UnavailableError(f"{request.model}: {reason}")
