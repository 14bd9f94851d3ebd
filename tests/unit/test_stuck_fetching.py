"""Files from machines and hubs that trickle, or send nothing, or find no room on this disk.

Servers in this process, over real gRPC and HTTP, and a download that its caller gives up: no fetch
waits for ever, and none takes for right what was not written.
"""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from node.weights import fetch, hub, pull, store
from node.weights.fetch import fetch_ranges
from node.weights.progress import Rate
from node.weights.sources import Sources
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.hub import Hub
from tests.support.mounts import fill, small_disk
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.checkpoint import Checkpoint, File, Manifest
from unicluster.checkpoints.ranges import without
from unicluster.checkpoints.weights_service import WeightsService
from unicluster.cluster.channels import bind, make_server
from unicluster.deadlines import VARIABLE
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.v1.weights_pb2 import Block, ByteRange, Holdings
from unicluster.v1.weights_pb2_grpc import add_WeightsServicer_to_server

CLUSTER = Cluster.new()
REPO, NAME = "lab/tiny", "model.safetensors"
CONTENT = bytes(range(256)) * 4000
# Seconds in which too few bytes count as none.
WINDOW = 0.3 * scaled(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(WINDOW))
    monkeypatch.setattr(pull, "PROGRESS_SECONDS", 1.0)
    monkeypatch.setattr(pull, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(hub, "FIRST_RETRY_SECONDS", 0.0)


class Sender(WeightsService):
    """Has the file, and sends `size` bytes of it every `pause` seconds.

    coming: says that it does not have the file yet, for ever.
    """

    def __init__(self, size: int, pause: float, *, coming: bool = False) -> None:
        super().__init__(lambda model, revision: None)
        self.size, self.pause, self.coming = size, pause, coming

    async def Have(self, request: Any, context: Any) -> Holdings:  # type: ignore[override]  # noqa: N802
        made = Holdings(revision=request.files.revision)
        file = made.files.add(name=NAME, size=len(CONTENT), coming=self.coming)
        if not self.coming:
            file.held.append(ByteRange(start=0, end=len(CONTENT)))
        return made

    async def Read(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        for start in range(0, len(CONTENT), self.size):
            await asyncio.sleep(self.pause)
            await context.write(Block(data=CONTENT[start : start + self.size]))
        await context.write(Block(sha256=hashlib.sha256(CONTENT).digest()))


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    servers = []

    async def start(sender: Sender) -> str:
        server = make_server()
        add_WeightsServicer_to_server(sender, server)
        port = bind(server, "127.0.0.1", 0, CLUSTER.issue("bob"))
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(grace=None)


def empty_copy(root: Path) -> Checkpoint:
    return Checkpoint.create(root, Manifest(REPO, "1" * 40, {NAME: File(len(CONTENT), "")}))


async def fetched(root: Path, *addresses: str) -> bytes:
    copy = empty_copy(root)
    async with Sources(addresses, CLUSTER.issue("ann")) as sources, asyncio.timeout(scaled(60)):
        await sources.fetch(copy, {NAME: copy.all_of(NAME)})
    return copy.read(NAME, 0, len(CONTENT))


@pytest.mark.parametrize(("size", "pause"), [(1, 0.05), (1000, 3600.0)], ids=["trickles", "hangs"])
async def test_a_machine_that_sends_next_to_nothing_is_named(
    serve: Any, tmp_path: Path, size: int, pause: float
) -> None:
    address = await serve(Sender(size, pause))

    with pytest.raises(
        UnavailableError, match=rf"{NAME}.*{address}.* has sent (no more than|nothing) "
    ):
        await fetched(tmp_path, address)


async def test_another_machine_takes_over_from_one_that_trickles(
    serve: Any, tmp_path: Path
) -> None:
    slow, quick = await serve(Sender(1, 0.05)), await serve(Sender(100_000, 0.0))

    assert await fetched(tmp_path, slow, quick) == CONTENT


async def test_a_slow_machine_is_waited_for(serve: Any, tmp_path: Path) -> None:
    """Longer than a window, and than the deadline of progress."""
    pieces = 20
    address = await serve(Sender(len(CONTENT) // pieces, 4 * WINDOW / pieces))

    assert await fetched(tmp_path, address) == CONTENT


async def test_a_file_that_never_comes_is_not_waited_for(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "SLOWEST_BYTES_A_SECOND", len(CONTENT))
    address = await serve(Sender(1, 0.0, coming=True))

    with pytest.raises(UnavailableError, match=f"can't get {NAME}"):
        await fetched(tmp_path, address)


def test_time_spent_elsewhere_is_not_the_sender_s() -> None:
    rate = Rate("bob")
    for _ in range(50):
        rate.waiting()
        rate.note(1)
        time.sleep(WINDOW / 20)  # a slow disk of ours


# From the hub


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / NAME).write_bytes(CONTENT)
    with Hub() as served:
        served.add(REPO, tmp_path / "model")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, served.endpoint
        )
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served


async def get(copy: Checkpoint, reported: list[int] | None = None) -> None:
    """Fetches the file from the hub, as a worker of one stage does; `reported`: bytes so far."""
    numbers = [] if reported is None else reported
    async with Sources((), CLUSTER.issue("ann")) as sources, asyncio.timeout(scaled(60)):
        await fetch_ranges(
            copy, {NAME: copy.all_of(NAME)}, [NAME], sources, lambda done, _: numbers.append(done)
        )


async def test_a_hub_that_trickles_is_given_up(served: Hub) -> None:
    copy = store.create(hub.resolve(REPO))
    served.throttle = 200.0

    with pytest.raises(UnavailableError, match=f"the hub, asked for {NAME}, has sent no more than"):
        await get(copy)


async def test_a_download_ends_with_its_caller_and_others_go_on(served: Hub) -> None:
    copy = store.create(hub.resolve(REPO))
    served.throttle = 100_000.0
    reported: list[int] = []
    first = asyncio.create_task(get(copy))
    await asyncio.to_thread(until, lambda: served.sent(NAME) > 20_000, "the first downloads")
    second = asyncio.create_task(get(copy, reported))
    await asyncio.to_thread(until, lambda: max(reported, default=0) > 0, "the second waits")

    first.cancel()
    served.throttle = None
    await second

    assert copy.read(NAME, 0, len(CONTENT)) == CONTENT
    assert reported[-1] == len(CONTENT)
    assert len(served.downloads()[NAME]) == 2  # the second went on where the first was
    assert served.downloads()[NAME][1][0] > 0


async def test_a_download_that_nobody_waits_for_ends(served: Hub) -> None:
    copy = store.create(hub.resolve(REPO))
    served.throttle = 50_000.0
    getting = asyncio.create_task(get(copy))
    await asyncio.to_thread(until, lambda: served.sent(NAME) > 0, "it downloads")
    running = [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]

    getting.cancel()

    await asyncio.gather(getting, return_exceptions=True)
    await asyncio.to_thread(until, lambda: not any(t.is_alive() for t in running), "it ends", 10)
    assert served.sent(NAME) < len(CONTENT)


async def test_of_a_header_no_more_is_read_than_it_has_and_not_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a file that is here but for its last byte, which may have many gigabytes."""
    file = write_gguf(tmp_path / "model.gguf", "llama")
    data, size = file.read_bytes(), 64 << 20
    name = "model.gguf"
    copy = Checkpoint.create(tmp_path / "copy", Manifest(REPO, "1" * 40, {name: File(size, "")}))
    copy.write(name, 0, data)
    copy.list(name, ((0, size - 1),))
    reads: list[tuple[int, bool]] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, name: str, start: int, end: int) -> bytes:
        reads.append((end - start, threading.current_thread() is threading.main_thread()))
        return read(self, name, start, end)

    monkeypatch.setattr(Checkpoint, "read", noted)
    async with Sources((), CLUSTER.issue("ann")) as sources:
        await fetch._fetch_description(copy, sources)

    assert reads
    assert max(length for length, _ in reads) < 1 << 20
    assert not any(on_loop for _, on_loop in reads)


# To a disk that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as made:
        if made is None:
            pytest.skip("only root may mount a small disk")
        yield made


def leave(disk: Path, room: int) -> Path:
    """Takes all of a disk but `room` bytes; the file that has it."""
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - room)
    return filler


def assert_right(copy: Checkpoint) -> None:
    """All that a copy says it has is so."""
    for start, end in copy.available(NAME):
        assert copy.read(NAME, start, end) == CONTENT[start:end]


async def test_a_machine_s_bytes_find_no_room_until_there_is_some(
    serve: Any, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills after its room was looked at. A block of odd size finds room for a part."""
    monkeypatch.setattr(fetch, "check_space", lambda *arguments: None)
    address = await serve(Sender(10_007, 0.0))
    copy = empty_copy(disk / "copy")
    filler = leave(disk, len(CONTENT) // 2)

    async def pulled() -> None:
        async with Sources([address], CLUSTER.issue("ann")) as sources, asyncio.timeout(scaled(60)):
            await fetch_ranges(copy, {NAME: copy.all_of(NAME)}, (), sources)

    with pytest.raises(UnavailableError, match=f"^{disk}/copy: can't be written: No space left .*"):
        await pulled()
    assert_right(copy)

    filler.unlink()
    await pulled()
    assert copy.read(NAME, 0, len(CONTENT)) == CONTENT


async def test_a_hub_s_bytes_find_no_room_until_there_is_some(
    served: Hub, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk / "cache"))
    monkeypatch.setattr(fetch, "check_space", lambda *arguments: None)
    copy = store.create(hub.resolve(REPO))
    filler = leave(disk, len(CONTENT) // 2)

    with pytest.raises(UnavailableError, match=rf"^{REPO}: No space left on device: make room, or"):
        await get(copy)
    assert_right(copy)

    filler.unlink()
    await get(copy)
    assert copy.read(NAME, 0, len(CONTENT)) == CONTENT


def test_where_the_system_writes_a_part_the_rest_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = empty_copy(tmp_path)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: whole(to, data[:777], at))

    copy.write(NAME, 0, CONTENT)

    assert copy.read(NAME, 0, len(CONTENT)) == CONTENT


def test_a_list_that_was_cut_off_says_no_more_than_is_true(tmp_path: Path) -> None:
    copy = empty_copy(tmp_path)
    first, second = (1024, 20_480), (40_960, 81_920)
    copy.list(NAME, (first,))
    (listed,) = tmp_path.glob(f"{NAME}.*")
    text = listed.read_bytes()

    for length in range(len(text)):
        listed.write_bytes(text[:length])
        assert without(copy.available(NAME), (first,)) == ()

        copy.list(NAME, (second,))
        assert without(copy.available(NAME), (first, second)) == ()
        assert without((second,), copy.available(NAME)) == ()


@pytest.mark.parametrize("line", [b"\xff\xfe", b"7", b"9 7", b"0 99999999999", b"-1 7", b"1 2 3"])
def test_a_damaged_line_of_a_list_says_nothing(tmp_path: Path, line: bytes) -> None:
    copy = empty_copy(tmp_path)
    copy.list(NAME, ((0, 7),))
    (listed,) = tmp_path.glob(f"{NAME}.*")
    listed.write_bytes(line + b"\n" + listed.read_bytes())

    assert copy.available(NAME) == ((0, 7),)
