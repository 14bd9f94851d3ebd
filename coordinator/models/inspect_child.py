"""Layouts from configurations alone, by a short-lived child: MLX never enters this process."""

import importlib.util
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from coordinator.programs import INSPECT_CONFIG
from unicluster.errors import InputError, UnavailableError
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

SECONDS = 300.0


def possible_here() -> bool:
    """Whether this machine has what the child needs."""
    return importlib.util.find_spec("mlx_lm") is not None


def layouts(requests: Sequence[InspectRequest]) -> list[ModelLayout]:
    """What each model weighs, from its config.json alone; seconds for the first, then less.

    A request without `config_json` names a directory, a file or a hub repository to take it
    from. Raises InputError with the child's one-line reason, UnavailableError if it takes too long.
    """
    stream = io.BytesIO()
    for request in requests:
        serialize_length_prefixed(request, stream)
    try:
        child = subprocess.run(
            [sys.executable, "-m", INSPECT_CONFIG],
            input=stream.getvalue(),
            capture_output=True,
            timeout=SECONDS,
            cwd=Path(__file__).parents[2],
        )
    except subprocess.TimeoutExpired as error:
        reason = f"no answer after {SECONDS:.0f} s: this machine is too busy, try again"
        raise UnavailableError(f"{requests[0].model}: {reason}") from error
    if child.returncode != 0:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        raise InputError(lines[-1] if lines else f"{requests[0].model}: can't be inspected")
    answers = io.BytesIO(child.stdout)
    found = [parse_length_prefixed(ModelLayout, answers) for _ in requests]
    return [layout for layout in found if layout is not None]
