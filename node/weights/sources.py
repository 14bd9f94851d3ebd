"""The other machines of the cluster as sources of a model's files."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio

from node.weights.pull import ANSWER_SECONDS, LOOK_SECONDS, OnBytes, Source, Work, pull
from unicluster.checkpoints.checkpoint import Checkpoint, File, Manifest, is_weights
from unicluster.checkpoints.ranges import Ranges
from unicluster.cluster.channels import as_error, connect
from unicluster.dialing.dialer import Dialer, Reached
from unicluster.errors import InputError, UniclusterError
from unicluster.trust.identity import Credentials, Identity
from unicluster.v1.weights_pb2 import HaveRequest, Holdings, ModelFiles
from unicluster.v1.weights_pb2_grpc import WeightsStub

if TYPE_CHECKING:
    from unicluster.v1.weights_pb2_grpc import WeightsAsyncStub

log = logging.getLogger(__name__)


class Sources:
    """The machines that may have a model's files, by address. An async context manager.

    vouching: the trusted ones among them, whose files are authoritative: the source that the
    coordinator trusts, which is itself for a directory that it offers. elsewhere: other addresses
    of the machine at an address, which is used at the best of them.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        identity: Credentials,
        vouching: Collection[str] = (),
        elsewhere: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._sources = {address: _Source(address, identity) for address in addresses}
        self._vouching = [address for address in self._sources if address in vouching]
        self._elsewhere = {a: elsewhere[a] for a in self._sources if a in elsewhere}
        self._dialer = Dialer(identity)

    async def __aenter__(self) -> Self:
        reaching = [self._reach(address, others) for address, others in self._elsewhere.items()]
        await asyncio.gather(*reaching)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for source in self._sources.values():
            await source.close()

    async def _reach(self, address: str, others: Sequence[str]) -> None:
        """Where nobody answers the address stays, whose calls then say so."""
        try:
            reached = await self._dialer.reach([address, *others], f"machine at {address}")
        except UniclusterError as error:
            log.info("%s", error)
            return
        self._sources[address].move_to(reached)

    async def manifest(self, model: str, revision: str) -> Manifest | None:
        """Manifest of a model, as reported by the first machine that can describe it in full.

        An empty `revision` means the newest that the machine knows.
        """
        for holdings in await self._described(model, revision):
            try:
                files = {file.name: File(file.size, file.checksum) for file in holdings.files}
                return Manifest(model, holdings.revision, files)
            except InputError as error:
                log.warning("%s: a machine describes it wrongly: %s", model, error)
        return None

    async def starts(self, manifest: Manifest) -> dict[str, int]:
        """Bytes available from the start of each file on some machine: at least its header.

        Empty when no machine can describe the model in full.
        """
        starts: dict[str, int] = {}
        for holdings in await self._described(manifest.model, manifest.revision):
            for file in holdings.files:
                if file.held:
                    starts[file.name] = max(starts.get(file.name, 0), file.held[0].end)
        return starts

    async def fetch(
        self,
        checkpoint: Checkpoint,
        wanted: dict[str, Ranges],
        on_bytes: OnBytes = lambda count: None,
    ) -> None:
        """Fetches parts of files into a copy, from all machines that have them at once.

        Waits for files in flight from the hub to a machine. Raises UnavailableError when no
        machine has, or will have, what is missing.
        """
        work = Work(checkpoint, wanted)
        pulls = [
            asyncio.create_task(
                pull(work, address, source.stub, on_bytes, self._vouchers_for(address))
            )
            for address, source in self._sources.items()
        ]
        try:
            while work.left:
                work.check_progress(alone=not pulls)
                done, _ = await asyncio.wait(
                    pulls, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
        finally:
            for task in pulls:
                task.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    def _vouchers_for(self, address: str) -> list[Source]:
        """Machines that vouch for the bytes that another sends; empty where it vouches itself."""
        if address in self._vouching:
            return []
        return [self._sources[voucher].stub for voucher in self._vouching]

    async def _described(self, model: str, revision: str) -> list[Holdings]:
        """Holdings of the machines that can describe a model in full, of the revision asked for."""
        request = HaveRequest(files=ModelFiles(model=model, revision=revision))
        answers = await asyncio.gather(
            *(self._have(address, request) for address in self._vouching or self._sources)
        )
        if self._vouching and not any(answers):  # they have nothing of this model
            answers = await asyncio.gather(*(self._have(a, request) for a in self._sources))
        return [
            holdings
            for holdings in answers
            if holdings is not None
            and (not revision or holdings.revision == revision)
            and _is_described(holdings)
        ]

    async def _have(self, address: str, request: HaveRequest) -> Holdings | None:
        try:
            return await self._sources[address].stub().Have(request, timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.info("%s", as_error(error, address))
            return None


class _Source:
    """One machine, over a channel that is made anew when the certificate that it shows was renewed.

    A download may take longer than a certificate lives. Older channels stay until `close`: calls
    may still run over them.
    """

    def __init__(self, address: str, identity: Credentials) -> None:
        self._address = address
        self._machine = ""  # its id; empty: any member's
        self._identity = identity
        self._shown: Identity | None = None
        self._channels: list[grpc.aio.Channel] = []

    def move_to(self, reached: Reached) -> None:
        """Uses the address at which the machine answered, before the first call."""
        self._address = reached.address
        self._machine = reached.machine if reached.is_pinned else ""

    def stub(self) -> "WeightsAsyncStub":
        """The machine's service; connects when it is first called."""
        if (now := self._identity.current) is not self._shown:
            self._channels.append(connect(self._address, now, machine=self._machine))
            self._shown = now
        return WeightsStub(self._channels[-1])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(grace=None)


def _is_described(holdings: Holdings) -> bool:
    """Whether a machine has the small files, and at least the headers of the weights."""
    return bool(holdings.files) and all(
        file.size == 0 or (file.held and file.held[0].start == 0)
        if is_weights(file.name)
        else sum(part.end - part.start for part in file.held) == file.size
        for file in holdings.files
    )
