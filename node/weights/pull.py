"""The parts of files that a copy lacks, and how they are pulled from one machine."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import Ranges, batches, merged, size, within, without
from unicluster.cluster.channels import as_error
from unicluster.cluster.roles import audit
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.v1.weights_pb2 import ByteRange, HaveRequest, Holdings, ModelFiles, ReadRequest

if TYPE_CHECKING:
    from unicluster.v1.weights_pb2_grpc import WeightsAsyncStub

log = logging.getLogger(__name__)

# What is asked for at once, verified, and then kept whatever happens.
BATCH_BYTES = 32 << 20
ANSWER_SECONDS = 10.0
# To read and hash a batch, on a disk that others keep busy.
DIGEST_SECONDS = 60.0
# Between two looks whether a machine has more by now.
LOOK_SECONDS = 0.5
# A machine that lacks a file may be about to fetch it, and one that fails be restarting.
PATIENCE_SECONDS = 20.0

OnBytes = Callable[[int], None]
Batch = tuple[str, Ranges]


class Work:
    """What is still to be fetched into a copy, shared by those who pull."""

    def __init__(self, checkpoint: Checkpoint, wanted: dict[str, Ranges]) -> None:
        self.checkpoint = checkpoint
        self.finished = asyncio.Event()
        self.problem = "no machine of this cluster has it"
        self._waiting: list[Batch] = [
            (name, batch)
            for name, ranges in wanted.items()
            for batch in batches(checkpoint.missing(name, ranges), BATCH_BYTES)
        ]
        self.left = len(self._waiting)
        self._hope = time.monotonic()

    @property
    def files(self) -> ModelFiles:
        manifest = self.checkpoint.manifest
        return ModelFiles(model=manifest.model, revision=manifest.revision)

    def take(self, held: dict[str, Ranges]) -> Batch | None:
        """Something to do for who holds so much."""
        for index, (name, ranges) in enumerate(self._waiting):
            if not without(ranges, held.get(name, ())):
                return self._waiting.pop(index)
        return None

    def give_back(self, batch: Batch) -> None:
        self._waiting.insert(0, batch)

    def finish(self) -> None:
        self.left -= 1
        if not self.left:
            self.finished.set()

    def hope(self) -> None:
        """Something came, or is on its way to a machine of the cluster."""
        self._hope = time.monotonic()

    def is_waiting_for(self, name: str) -> bool:
        return any(waiting == name for waiting, _ in self._waiting)

    def check_hope(self, alone: bool) -> None:
        """Raises UnavailableError when nothing has come for a while, or nobody can be asked."""
        if alone or time.monotonic() - self._hope > PATIENCE_SECONDS:
            missing = ", ".join(sorted({name for name, _ in self._waiting}))
            raise UnavailableError(
                f"{self.checkpoint.manifest.model}: can't get {missing}: {self.problem}"
            )


class _FalseError(Exception):
    """What came of a file is not what those who vouch for it have."""


async def pull(
    work: Work,
    address: str,
    stub: "WeightsAsyncStub",
    on_bytes: OnBytes,
    vouchers: "Sequence[WeightsAsyncStub]" = (),
) -> None:
    """Pulls from one machine whatever it has, until there is nothing left to do.

    vouchers: machines whose word counts for what is in the files, if they have them; one that
    sends other bytes is asked no more. Raises OSError when this machine can't store it.
    """
    while work.left:
        try:
            holdings = await stub.Have(HaveRequest(files=work.files), timeout=ANSWER_SECONDS)
            if holdings.revision and holdings.revision != work.files.revision:
                raise UnavailableError(f"{address} answers of another revision")
            held = _held(holdings)
            if any(file.coming and work.is_waiting_for(file.name) for file in holdings.files):
                work.hope()
            while (batch := work.take(held)) is not None:
                await _pull_batch(work, batch, stub, on_bytes, vouchers)
        except _FalseError as error:
            audit.warning("%s sent other bytes than there are in %s", address, error)
            work.problem = f"{address} sent other bytes than there are in {error}"
            return  # nothing more is taken from it
        except (grpc.aio.AioRpcError, UnavailableError) as error:
            work.problem = str(_explained(error, address))
            log.info("%s", work.problem)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(work.finished.wait(), LOOK_SECONDS)


async def _pull_batch(
    work: Work,
    batch: Batch,
    stub: "WeightsAsyncStub",
    on_bytes: OnBytes,
    vouchers: "Sequence[WeightsAsyncStub]",
) -> None:
    """Gives the batch back, and takes its bytes off what `on_bytes` has counted, if it fails."""
    name, ranges = batch
    total = size(ranges)
    came, digest, said = 0, hashlib.sha256(), b""
    request = ReadRequest(
        files=work.files, name=name, ranges=[ByteRange(start=s, end=e) for s, e in ranges]
    )
    try:
        async for block in stub.Read(request):
            said = block.sha256
            if came + len(block.data) > total:
                raise UnavailableError(f"of {name} more came than was asked for")
            if block.data:
                work.hope()
                where = within(ranges, came, came + len(block.data))
                await asyncio.to_thread(_store, work.checkpoint, name, where, block.data)
                digest.update(block.data)
                came += len(block.data)
                on_bytes(len(block.data))
        if said != digest.digest() or came != total:
            raise UnavailableError(f"{name} arrived damaged")
        if await _is_false(request, digest.digest(), vouchers):
            raise _FalseError(name)
        await asyncio.to_thread(work.checkpoint.list, name, ranges)
    except BaseException:
        on_bytes(-came)
        work.give_back(batch)
        raise
    work.finish()


async def _is_false(
    request: ReadRequest, sha256: bytes, vouchers: "Sequence[WeightsAsyncStub]"
) -> bool:
    """Whether one of those who vouch for the file has other bytes there.

    Raises AioRpcError where one can't be asked; who lacks the bytes has nothing to say.
    """
    for voucher in vouchers:
        try:
            known = await voucher.Digest(request, timeout=DIGEST_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            continue
        return known.sha256 != sha256
    return False


def _explained(error: grpc.aio.AioRpcError | UnavailableError, address: str) -> UniclusterError:
    return as_error(error, address) if isinstance(error, grpc.aio.AioRpcError) else error


def _store(checkpoint: Checkpoint, name: str, where: Ranges, data: bytes) -> None:
    at = 0
    for start, end in where:
        checkpoint.write(name, start, data[at : at + end - start])
        at += end - start


def _held(holdings: Holdings) -> dict[str, Ranges]:
    return {file.name: merged((r.start, r.end) for r in file.held) for file in holdings.files}
