"""Gives other machines of the cluster what they lack of a model's files."""

import asyncio
import hashlib
from collections.abc import Callable, Collection
from typing import Any

import grpc

from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import merged, without
from unicluster.cluster.abort import abort
from unicluster.errors import InputError, NotFoundError
from unicluster.v1.weights_pb2 import (
    Block,
    ByteRange,
    HaveRequest,
    HeldFile,
    Holdings,
    ModelFiles,
    ReadRequest,
)
from unicluster.v1.weights_pb2_grpc import WeightsServicer

BLOCK_BYTES = 1 << 20

Context = grpc.aio.ServicerContext[Any, Any]
Find = Callable[[str, str], Checkpoint | None]


class WeightsService(WeightsServicer):
    """Reads from the copies that `find(model, revision)` knows on this machine.

    `coming(model, revision)` names the files that are being fetched from the hub.
    """

    def __init__(
        self, find: Find, coming: Callable[[str, str], Collection[str]] = lambda *_: ()
    ) -> None:
        self._find = find
        self._coming = coming
        self.sent = 0  # bytes of files, to all

    async def Have(self, request: HaveRequest, context: Context) -> Holdings:  # noqa: N802
        return await asyncio.to_thread(self._holdings, request.files)

    async def Read(self, request: ReadRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        wanted = merged((r.start, r.end) for r in request.ranges)
        checkpoint = await asyncio.to_thread(
            self._find, request.files.model, request.files.revision
        )
        if checkpoint is None or request.name not in checkpoint.manifest.files:
            what = f"{request.name} of {request.files.model}"
            await abort(context, NotFoundError(f"{what} is not on this machine"))
        if without(wanted, checkpoint.held(request.name)):
            what = f"{request.name} of {request.files.model}"
            await abort(context, NotFoundError(f"this machine has only a part of {what}"))
        digest = hashlib.sha256()
        for start, end in wanted:
            for at in range(start, end, BLOCK_BYTES):
                try:
                    data = await asyncio.to_thread(
                        checkpoint.read, request.name, at, min(end, at + BLOCK_BYTES)
                    )
                except (InputError, OSError) as error:
                    await abort(context, NotFoundError(f"{request.name}: {error}"))
                digest.update(data)
                await context.write(Block(data=data))
                self.sent += len(data)
        await context.write(Block(sha256=digest.digest()))

    def _holdings(self, files: ModelFiles) -> Holdings:
        checkpoint = self._find(files.model, files.revision)
        if checkpoint is None:
            return Holdings()
        manifest = checkpoint.manifest
        coming = self._coming(files.model, manifest.revision)
        return Holdings(
            revision=manifest.revision,
            files=[
                HeldFile(
                    name=name,
                    size=file.size,
                    checksum=file.checksum,
                    held=[ByteRange(start=s, end=e) for s, e in checkpoint.held(name)],
                    coming=name in coming,
                )
                for name, file in manifest.files.items()
            ],
        )
