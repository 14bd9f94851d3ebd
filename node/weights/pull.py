"""Pulls the missing parts of files from one machine."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from node.weights.progress import SLOWEST_BYTES_A_SECOND, Rate
from unicluster import failpoints
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import Ranges, batches, merged, size, within, without
from unicluster.cluster.channels import as_error
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.stall import within as within_seconds
from unicluster.trust.role import audit
from unicluster.v1.weights_pb2 import (
    Block,
    ByteRange,
    HaveRequest,
    Holdings,
    ModelFiles,
    ReadRequest,
)

if TYPE_CHECKING:
    from unicluster.v1.weights_pb2_grpc import WeightsAsyncStub

log = logging.getLogger(__name__)

# Requested at once, verified together, and then stored even if the next request fails.
BATCH_BYTES = 32 << 20
ANSWER_SECONDS = 10.0
# Batches in a row that a machine may begin and not send as they are.
MOST_FAILURES = 5
# To read and hash a batch, on a disk that others keep busy.
DIGEST_SECONDS = 60.0
# Between two requests for the list of what a machine has.
LOOK_SECONDS = 0.5
# The progress deadline: a machine without a file may be about to fetch it, and one that fails may
# be restarting.
PROGRESS_SECONDS = 20.0

OnBytes = Callable[[int], None]
Batch = tuple[str, Ranges]
# A machine's service, over a channel that shows the certificate that is current.
Source = Callable[[], "WeightsAsyncStub"]


class Work:
    """Batches still to be fetched into a copy, shared by the pulls from all machines."""

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
        self._last_progress = time.monotonic()
        self._in_flight: dict[Batch, str] = {}  # and the addresses that they come from
        self._coming: dict[tuple[str, str], tuple[int, float]] = {}

    @property
    def files(self) -> ModelFiles:
        manifest = self.checkpoint.manifest
        return ModelFiles(model=manifest.model, revision=manifest.revision)

    def take(self, available: dict[str, Ranges], address: str) -> Batch | None:
        """Takes the first batch that lies within `available`, ranges by file; None if none does.

        address: of the machine that it is fetched from.
        """
        for index, (name, ranges) in enumerate(self._waiting):
            if not without(ranges, available.get(name, ())):
                batch = self._waiting.pop(index)
                self._in_flight[batch] = address
                return batch
        return None

    def give_back(self, batch: Batch) -> None:
        del self._in_flight[batch]
        self._waiting.insert(0, batch)

    def finish(self, batch: Batch) -> None:
        del self._in_flight[batch]
        self.left -= 1
        if not self.left:
            self.finished.set()

    def note_progress(self) -> None:
        """Moves the progress deadline: bytes came, or are in flight to a machine of the cluster."""
        self._last_progress = time.monotonic()

    def note_coming(self, address: str, holdings: Holdings) -> None:
        """Moves the progress deadline for files in flight to a machine, unless they never arrive.

        A file may take as long as its bytes do at the slowest rate, each time more of it is there.
        """
        now = time.monotonic()
        for file in holdings.files:
            if not file.coming or not self.is_waiting_for(file.name):
                continue
            here = sum(part.end - part.start for part in file.held)
            known, since = self._coming.get((address, file.name), (-1, now))
            if here != known:
                known, since = self._coming[address, file.name] = here, now
            most = self.checkpoint.manifest.files[file.name].size / SLOWEST_BYTES_A_SECOND
            if now - since < PROGRESS_SECONDS + most:
                self.note_progress()

    def is_waiting_for(self, name: str) -> bool:
        return any(waiting == name for waiting, _ in self._waiting)

    def check_progress(self, alone: bool) -> None:
        """Raises UnavailableError after the progress deadline, or when no machine can be asked."""
        if alone or time.monotonic() - self._last_progress > PROGRESS_SECONDS:
            missing = ", ".join(sorted({name for name, _ in (*self._waiting, *self._in_flight)}))
            problem = self.problem
            if senders := ", ".join(sorted(set(self._in_flight.values()))):
                problem = f"{senders} has sent nothing for {PROGRESS_SECONDS:.0f} s"
            raise UnavailableError(
                f"{self.checkpoint.manifest.model}: can't get {missing}: {problem}"
            )


class _FalseError(Exception):
    """Bytes received of a file differ from those of a machine that vouches for it."""


async def pull(
    work: Work,
    address: str,
    source: Source,
    on_bytes: OnBytes,
    vouchers: Sequence[Source] = (),
) -> None:
    """Pulls from one machine whatever it has, until there is nothing left to do.

    vouchers: trusted machines, whose digests of the files count where they have them; a machine
    that sends other bytes is asked no more, nor is one that fails time after time, each time with
    some bytes that look like progress. Raises OSError when this machine can't store it.
    """
    failures = 0
    while work.left and failures < MOST_FAILURES:
        try:
            holdings = await source().Have(HaveRequest(files=work.files), timeout=ANSWER_SECONDS)
            if holdings.revision and holdings.revision != work.files.revision:
                raise UnavailableError(f"{address} answers for another revision")
            available = _available(holdings)
            work.note_coming(address, holdings)
            while (batch := work.take(available, address)) is not None:
                failures += 1
                await _pull_batch(work, batch, address, source, on_bytes, vouchers)
                failures = 0
        except _FalseError as error:
            audit.warning("%s sent wrong bytes of %s", address, error)
            work.problem = f"{address} sent wrong bytes of {error}"
            return  # it is asked no more
        except (grpc.aio.AioRpcError, UnavailableError) as error:
            work.problem = str(_explained(error, address))
            log.info("%s", work.problem)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(work.finished.wait(), LOOK_SECONDS)


async def _pull_batch(
    work: Work,
    batch: Batch,
    address: str,
    source: Source,
    on_bytes: OnBytes,
    vouchers: Sequence[Source],
) -> None:
    """If it fails, gives the batch back and subtracts its bytes from the progress in `on_bytes`."""
    name, ranges = batch
    total = size(ranges)
    received, digest, stated = 0, hashlib.sha256(), b""
    rate = Rate(f"{address}, asked for {name},")
    request = ReadRequest(
        files=work.files, name=name, ranges=[ByteRange(start=s, end=e) for s, e in ranges]
    )
    call = source().Read(request)
    try:
        while isinstance(block := await _next(call, rate), Block):
            stated = block.sha256
            if received + len(block.data) > total:
                raise UnavailableError(f"{name}: more bytes came than were requested")
            if block.data:
                await failpoints.reach_async("fetch.block")
                work.note_progress()
                where = within(ranges, received, received + len(block.data))
                await asyncio.to_thread(_store, work.checkpoint, name, where, block.data)
                digest.update(block.data)
                received += len(block.data)
                on_bytes(len(block.data))
        if stated != digest.digest() or received != total:
            raise UnavailableError(f"{name} arrived damaged")
        if await _is_false(request, digest.digest(), vouchers):
            raise _FalseError(name)
        await asyncio.to_thread(work.checkpoint.list, name, ranges)
    except BaseException:
        call.cancel()
        on_bytes(-received)
        work.give_back(batch)
        raise
    await failpoints.reach_async("fetch.fetched")
    work.finish(batch)


async def _next(call: "grpc.aio.UnaryStreamCall[ReadRequest, Block]", rate: Rate) -> object:
    """The next block, or the end; UnavailableError when none comes, or they only trickle."""

    async def read() -> object:
        return await call.read()

    rate.waiting()
    try:
        block = await within_seconds(rate.window_s, read())
    except TimeoutError:
        raise rate.too_slow() from None
    if isinstance(block, Block):
        rate.note(len(block.data))
    return block


async def _is_false(request: ReadRequest, sha256: bytes, vouchers: Sequence[Source]) -> bool:
    """Whether a machine that vouches for the file has other bytes there.

    Raises AioRpcError where one can't be asked; one without these bytes does not count.
    """
    for voucher in vouchers:
        try:
            known = await voucher().Digest(request, timeout=DIGEST_SECONDS)
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


def _available(holdings: Holdings) -> dict[str, Ranges]:
    return {file.name: merged((r.start, r.end) for r in file.held) for file in holdings.files}
