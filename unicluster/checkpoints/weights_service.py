"""Sends byte ranges of a model's files to other machines of the cluster."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import grpc

from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.names import ModelName, Revision
from unicluster.checkpoints.ranges import merged, without
from unicluster.cluster.abort import abort
from unicluster.errors import InputError, NotFoundError, shown
from unicluster.v1.weights_pb2 import (
    Block,
    ByteRange,
    HaveRequest,
    HeldFile,
    Holdings,
    ModelFiles,
    RangesDigest,
    ReadRequest,
)
from unicluster.v1.weights_pb2_grpc import WeightsServicer

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
# In one call; a batch that our own machines ask for has some hundreds.
MOST_RANGES = 1 << 14

Context = grpc.aio.ServicerContext[Any, Any]
Find = Callable[[str, str], Checkpoint | None]


class WeightsService(WeightsServicer):
    """Reads from the copies that `find(model, revision)` knows on this machine.

    `in_flight(model, revision)` names the files that are being fetched from the hub.
    """

    def __init__(
        self, find: Find, in_flight: Callable[[str, str], Collection[str]] = lambda *_: ()
    ) -> None:
        self._find = find
        self._in_flight = in_flight
        self.sent = 0  # bytes of files, to all

    async def Have(self, request: HaveRequest, context: Context) -> Holdings:  # noqa: N802
        files = await _checked(request.files, context)
        return await asyncio.to_thread(self._holdings, files)

    async def Read(self, request: ReadRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        digest = hashlib.sha256()
        async for data in self._blocks(request, context):
            digest.update(data)
            await context.write(Block(data=data))
            self.sent += len(data)
        await context.write(Block(sha256=digest.digest()))

    async def Digest(self, request: ReadRequest, context: Context) -> RangesDigest:  # noqa: N802
        digest = hashlib.sha256()
        async for data in self._blocks(request, context):
            await asyncio.to_thread(digest.update, data)
        return RangesDigest(sha256=digest.digest())

    async def _blocks(self, request: ReadRequest, context: Context) -> AsyncIterator[bytes]:
        """The bytes that are asked for, in pieces; ends the call where they can't be had."""
        files = await _checked(request.files, context)
        if len(request.ranges) > MOST_RANGES:
            count = f"{len(request.ranges)} ranges of bytes, and at most {MOST_RANGES} at a time"
            await abort(context, InputError(f"{files.model}: {count}"))
        checkpoint = await asyncio.to_thread(self._find, files.model, files.revision)
        what = f"{shown(request.name)} of {files.model}"
        if checkpoint is None or request.name not in checkpoint.manifest.files:
            await abort(context, NotFoundError(f"{what} is not on this machine"))
        wanted = merged((r.start, r.end) for r in request.ranges)
        if without(wanted, await asyncio.to_thread(checkpoint.available, request.name)):
            await abort(context, NotFoundError(f"this machine has only a part of {what}"))
        for start, end in wanted:
            for at in range(start, end, BLOCK_BYTES):
                stop = min(end, at + BLOCK_BYTES)
                try:
                    yield await asyncio.to_thread(checkpoint.read, request.name, at, stop)
                except (InputError, OSError) as error:
                    log.warning("%s: %s", what, error)
                    await abort(context, NotFoundError(f"{what} can't be read on this machine"))

    def _holdings(self, files: ModelFiles) -> Holdings:
        checkpoint = self._find(files.model, files.revision)
        if checkpoint is None:
            return Holdings()
        manifest = checkpoint.manifest
        in_flight = self._in_flight(files.model, manifest.revision)
        return Holdings(
            revision=manifest.revision,
            files=[
                HeldFile(
                    name=name,
                    size=file.size,
                    checksum=file.checksum,
                    held=[ByteRange(start=s, end=e) for s, e in checkpoint.available(name)],
                    coming=name in in_flight,
                )
                for name, file in manifest.files.items()
            ],
        )


async def _checked(files: ModelFiles, context: Context) -> ModelFiles:
    """`files`, if model and revision can be names of something; else the call ends."""
    try:
        ModelName(files.model)
        if files.revision:
            Revision(files.revision)
    except InputError as error:
        await abort(context, error)
    return files
