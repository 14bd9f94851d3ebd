"""Directories on this machine, given to the machines that serve them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc

from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.small_files import check_small_files
from unicluster.checkpoints.weights_service import WeightsService
from unicluster.v1.weights_pb2_grpc import add_WeightsServicer_to_server


@dataclass(frozen=True)
class Offered:
    """The fingerprint of each directory or GGUF, and where they can be had."""

    revisions: dict[str, str]
    sources: list[str]


def offer(models: Iterable[str], port: int, server: grpc.aio.Server) -> Offered:
    """Offers those of the models that are directories, on a server that listens at `port`.

    Raises InputError when one can't be read, or a small file of it is damaged.
    """
    files = {model: whole(Path(model)) for model in models if os.path.isabs(model)}
    if not files:
        return Offered({}, [])
    for each in files.values():
        check_small_files(each.root, each.manifest.small)

    def find(model: str, revision: str) -> Checkpoint | None:
        checkpoint = files.get(model)
        if checkpoint is None or checkpoint.manifest.revision != revision:
            return None
        return checkpoint

    add_WeightsServicer_to_server(WeightsService(find), server)
    return Offered({model: f.manifest.revision for model, f in files.items()}, [f":{port}"])
