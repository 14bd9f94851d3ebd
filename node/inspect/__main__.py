"""Layouts of models: `python -m node.inspect [--configs]`, so that the caller never imports MLX.

Reads InspectRequests from standard input, each with its length before it, and answers each with a
ModelLayout in the same form; or ends with one line on standard error and an error's exit code.

A request is answered from its `config_json`, if it has one, else from the checkpoint on this
machine that it names. With --configs a model named is looked up by its config.json alone: that of
the demo, a directory, or a hub repository. A GGUF is its own configuration.
"""

import contextlib
import io
import resource
import sys
from pathlib import Path

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from node.engines.choose import choose
from node.generation.config import check_defaults
from node.inspect.draft_vocabulary import check_draft
from node.inspect.from_config import inspect_config
from node.weights import store
from unicluster.checkpoints.checkpoint import is_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import InputError, UniclusterError
from unicluster.units import format_bytes
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

CONFIGS = "--configs"

# Of one layout; those of the largest models take some ten.
CPU_SECONDS = 120
DATA_BYTES = 4 << 30


def answer(request: InspectRequest, *, configs: bool = False) -> ModelLayout:
    """The requested layout. Raises InputError, NotFoundError or StageError."""
    if request.config_json or (configs and not is_gguf(request.model)):
        return inspect_config(request)
    if configs and not Path(request.model).is_absolute():
        raise InputError(
            f"{request.model}: a GGUF on the hub can't be inspected from here: give the file, "
            "or plan over the machines of a cluster, without --fleet"
        )
    checkpoint = (
        whole(Path(request.model)) if configs else store.find(request.model, request.revision)
    )
    if checkpoint is None:
        raise InputError(f"{request.model}: no longer on this machine")
    layout = choose(checkpoint).inspect(checkpoint, request)
    check_defaults(checkpoint.root)
    if request.drafts_for:
        check_draft(request, checkpoint)
    return layout


def limit(requests: int) -> None:
    """Sets limits by which the kernel ends this process: a checkpoint may be made to be absurd.

    Data and not address space, because weights are mapped, and only their headers are read.
    """
    seconds = CPU_SECONDS * max(requests, 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))


def main() -> None:
    configs = CONFIGS in sys.argv[1:]
    asked, answers = io.BytesIO(sys.stdin.buffer.read()), io.BytesIO()
    requests = list(iter(lambda: parse_length_prefixed(InspectRequest, asked), None))
    limit(len(requests))
    try:
        for request in requests:
            with contextlib.redirect_stdout(sys.stderr):  # libraries print
                layout = answer(request, configs=configs)
            serialize_length_prefixed(layout, answers)
    except UniclusterError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except MemoryError:
        print(f"a layout that needs more than {format_bytes(DATA_BYTES)}", file=sys.stderr)
        sys.exit(InputError.exit_code)
    sys.stdout.buffer.write(answers.getvalue())


if __name__ == "__main__":
    main()
