"""Weights from machines that send other bytes than there are in the trusted source."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from node.weights import caches, pull, store
from node.weights.fetch import describe
from node.weights.sources import Sources
from tests.support.tiny import tiny_config, write_model
from unicluster.checkpoints.checkpoint import Checkpoint, Manifest
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.weights_service import WeightsService
from unicluster.cluster.channels import bind, make_server
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.v1.weights_pb2 import Block, HaveRequest, Holdings, ReadRequest
from unicluster.v1.weights_pb2_grpc import add_WeightsServicer_to_server

HOST = "127.0.0.1"
WEIGHTS = "model.safetensors"


class Liar(WeightsService):
    """Sends altered bytes, with the right sum of those."""

    async def Read(self, request: ReadRequest, context: Any) -> None:  # noqa: N802
        digest = hashlib.sha256()
        async for data in self._blocks(request, context):
            altered = bytes([data[0] ^ 1]) + data[1:]
            digest.update(altered)
            await context.write(Block(data=altered))
        await context.write(Block(sha256=digest.digest()))


class Endless(WeightsService):
    """Never stops sending."""

    def __init__(self, find: Any) -> None:
        super().__init__(find)
        self.blocks = 0  # of 1 KiB

    async def Read(self, request: ReadRequest, context: Any) -> None:  # noqa: N802
        while True:
            self.blocks += 1
            await context.write(Block(data=bytes(1 << 10)))


class OtherRevision(WeightsService):
    """Describes something else than it was asked for."""

    async def Have(self, request: HaveRequest, context: Any) -> Holdings:  # noqa: N802
        holdings = await super().Have(request, context)
        holdings.revision = "f" * 40
        return holdings


class Offering:
    """A model's directory, and servers that say to have it."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.whole = whole(path)
        self.cluster = cluster
        self._servers: list[grpc.aio.Server] = []

    @property
    def manifest(self) -> Manifest:
        return self.whole.manifest

    def find(self, model: str, revision: str) -> Checkpoint | None:
        known = (model, revision) == (self.manifest.model, self.manifest.revision)
        return self.whole if known else None

    async def open(self, service: WeightsService) -> str:
        server = make_server()
        add_WeightsServicer_to_server(service, server)
        port = bind(server, HOST, 0, self.cluster.issue("server"))
        await server.start()
        self._servers.append(server)
        return f"{HOST}:{port}"

    async def close(self) -> None:
        for server in self._servers:
            await server.stop(grace=None)

    def empty_copy(self, root: Path) -> Checkpoint:
        return Checkpoint.create(root, self.manifest)

    def sources(self, *addresses: str, vouching: str = "") -> Sources:
        return Sources(addresses, self.cluster.issue("worker"), (vouching,))


@pytest.fixture
async def offering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Offering]:
    monkeypatch.setattr(pull, "PROGRESS_SECONDS", 2.0)
    path = write_model(tmp_path / "model", tiny_config("llama"))
    offering = Offering(path, Cluster.new())
    yield offering
    await offering.close()


def size_of(offering: Offering) -> int:
    return offering.manifest.files[WEIGHTS].size


def contents(checkpoint: Checkpoint) -> bytes:
    size = checkpoint.manifest.files[WEIGHTS].size
    return checkpoint.read(WEIGHTS, 0, size)


async def test_the_trusted_source_s_bytes_win(
    offering: Offering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest = await offering.open(WeightsService(offering.find))
    liar = await offering.open(Liar(offering.find))
    copy = offering.empty_copy(tmp_path / "copy")

    async with asyncio.timeout(60), offering.sources(liar, honest, vouching=honest) as sources:
        await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert contents(copy) == contents(offering.whole)


async def test_a_machine_is_asked_at_another_of_its_addresses(
    offering: Offering, tmp_path: Path
) -> None:
    """Where the one that the coordinator knows leads nowhere from here."""
    honest = await offering.open(WeightsService(offering.find))
    copy = offering.empty_copy(tmp_path / "copy")
    dead = f"{HOST}:9"
    sources = Sources([dead], offering.cluster.issue("worker"), (dead,), {dead: [honest]})

    async with asyncio.timeout(60), sources:
        await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert contents(copy) == contents(offering.whole)


async def test_a_liar_is_asked_no_more(
    offering: Offering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Voucher(WeightsService):
        async def Have(self, request: HaveRequest, context: Any) -> Holdings:  # noqa: N802
            return Holdings()  # it has the files, and lets others send them

    voucher = await offering.open(Voucher(offering.find))
    liar = await offering.open(Liar(offering.find))
    copy = offering.empty_copy(tmp_path / "copy")

    async with asyncio.timeout(60), offering.sources(liar, voucher, vouching=voucher) as sources:
        with pytest.raises(UnavailableError, match="sent wrong bytes of"):
            await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert not copy.available(WEIGHTS)
    lines = [r.getMessage() for r in caplog.records if r.name == "unicluster.audit"]
    assert lines == [f"{liar} sent wrong bytes of {WEIGHTS}"]


async def test_who_vouches_and_has_nothing_of_it_says_nothing(
    offering: Offering, tmp_path: Path
) -> None:
    silent = await offering.open(WeightsService(lambda model, revision: None))
    honest = await offering.open(WeightsService(offering.find))
    copy = offering.empty_copy(tmp_path / "copy")

    async with asyncio.timeout(60), offering.sources(honest, silent, vouching=silent) as sources:
        await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert contents(copy) == contents(offering.whole)


async def test_who_sends_without_end_is_hung_up_on(offering: Offering, tmp_path: Path) -> None:
    service = Endless(offering.find)
    endless = await offering.open(service)
    copy = offering.empty_copy(tmp_path / "copy")

    async with offering.sources(endless) as sources:
        with pytest.raises(UnavailableError, match="more bytes came than were requested"):
            await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert not copy.available(WEIGHTS)
    assert sum(file.stat().st_size for file in copy.root.iterdir()) < 2 * size_of(offering)


async def test_a_description_of_another_revision_is_not_believed(
    offering: Offering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await offering.open(OtherRevision(offering.find))
    monkeypatch.setattr(caches.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    async with offering.sources(other) as sources:
        found = await sources.manifest(offering.manifest.model, offering.manifest.revision)
        copy = offering.empty_copy(tmp_path / "copy")
        with pytest.raises(UnavailableError, match="answers for another revision"):
            await sources.fetch(copy, {WEIGHTS: copy.all_of(WEIGHTS)})

    assert found is None
    assert not (tmp_path / "cache").exists()


async def test_a_model_is_described_by_the_trusted_source(
    offering: Offering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = await offering.open(WeightsService(offering.find))
    liar = await offering.open(Liar(offering.find))
    monkeypatch.setattr(caches.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "whole", lambda path: whole(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()

    async with asyncio.timeout(60), offering.sources(liar, honest, vouching=honest) as sources:
        copy = await describe(offering.manifest.model, offering.manifest.revision, sources)

    for name in copy.manifest.small:
        size = copy.manifest.files[name].size
        assert copy.read(name, 0, size) == offering.whole.read(name, 0, size)
