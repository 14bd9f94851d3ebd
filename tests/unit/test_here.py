"""Services of this machine, reached by their notes; and when nothing is served."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.fleet.members import Members
from unicluster.cluster import here
from unicluster.cluster.channels import bind, make_server
from unicluster.cluster.idle import idle
from unicluster.cluster.records import Kind
from unicluster.trust.cluster import Cluster
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import DescribeNodeRequest, NodeInfo, StageSpec
from unicluster.v1.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server

HOST = "127.0.0.1"
NOBODY = f"{HOST}:1"


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    monkeypatch.setattr(here, "DEFAULT_PORTS", {Kind.NODE: 1, Kind.CHAT: 1})
    return Store().create()


class Described(NodeServicer):
    def __init__(self, info: NodeInfo) -> None:
        self._info = info

    async def Describe(self, request: DescribeNodeRequest, context: Any) -> NodeInfo:  # noqa: N802
        return self._info


@asynccontextmanager
async def agent(
    cluster: Cluster, name: str, *, peers: Sequence[str] = (), stages: int = 0
) -> AsyncIterator[str]:
    """The address of an agent that describes itself so."""
    server = make_server()
    port = bind(server, HOST, 0, cluster.issue(name))
    info = NodeInfo(name=name, peers=peers, stages=[StageSpec()] * stages)
    info.protocol, info.oldest_protocol = here.PROTOCOL, here.OLDEST_PROTOCOL
    add_NodeServicer_to_server(Described(info), server)
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


def note(tmp_path: Path, address: str, *, since: float = 0.0) -> None:
    """Leaves the note of an agent at that address."""
    port = int(address.rpartition(":")[2])
    with here.noted(Kind.NODE, HOST, port):
        (path,) = (tmp_path / here.FOLDER).glob(f"node-{port}.json")
        text = json.dumps({**json.loads(path.read_text("utf-8")), "since": since})
    path.write_text(text, "utf-8")


def addresses(kind: Kind) -> list[str]:
    return [
        service.address for service in here.services(kind) if not service.address.endswith(":1")
    ]


def test_a_service_is_noted_while_it_runs() -> None:
    with here.noted(Kind.CHAT, HOST, 4000), here.noted(Kind.NODE, HOST, 4001):
        assert addresses(Kind.CHAT) == [f"{HOST}:4000"]
        assert addresses(Kind.NODE) == [f"{HOST}:4001"]
        assert not here.services(Kind.NODE)[0].settled
    assert addresses(Kind.CHAT) == addresses(Kind.NODE) == []
    assert here.services(Kind.NODE)[0].settled  # the usual port: somebody may be there for long


def test_notes_that_are_none_are_ignored_and_stale_ones_removed(tmp_path: Path) -> None:
    folder = tmp_path / here.FOLDER
    folder.mkdir()
    for number, text in enumerate(("", "[]", "{", '{"address": 3}', "\0\udcff")):
        (folder / f"node-{number}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (folder / "node-7.json").mkdir()
    assert addresses(Kind.NODE) == []
    dead = {"address": NOBODY, "since": 0, "version": "", "protocol": 2, "oldest": 2, "pid": 2**30}
    (folder / "node-8.json").write_text(json.dumps(dead), "utf-8")

    with here.noted(Kind.NODE, HOST, 4001):
        assert addresses(Kind.NODE) == [f"{HOST}:4001"]
        left = {path.name for path in folder.iterdir()}
    assert left == {"node-4001.json", "node-7.json"}


def test_a_folder_that_cannot_be_written_stops_no_service(tmp_path: Path) -> None:
    (tmp_path / here.FOLDER).write_text("no folder")

    with here.noted(Kind.NODE, HOST, 4001):
        assert addresses(Kind.NODE) == []


async def test_members_are_all_that_an_agent_of_this_machine_knows(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with agent(cluster, "bob") as bob, agent(cluster, "ann", peers=[bob]) as ann:
        note(tmp_path, ann)
        async with Members(cluster, cluster.issue("me")) as members:
            await members.find()
            found = {info.name: address for info, address in await members.nodes()}

    assert found == {"ann": ann, "bob": bob}


async def test_an_address_that_others_know_is_preferred(cluster: Cluster, tmp_path: Path) -> None:
    async with (
        agent(cluster, "ann") as elsewhere,
        agent(cluster, "bob", peers=[elsewhere]) as bob,
        agent(cluster, "ann", peers=[bob]) as ann,
    ):
        note(tmp_path, ann)
        async with Members(cluster, cluster.issue("me")) as members:
            assert await members.ask_here()
            found = {info.name: address for info, address in await members.nodes()}

    assert found == {"ann": elsewhere, "bob": bob}


async def test_an_agent_that_has_just_begun_is_not_relied_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    with here.noted(Kind.NODE, HOST, 9):  # nobody is there
        async with Members(cluster, cluster.issue("me")) as members:
            assert not await members.ask_here()
    async with agent(cluster, "ann") as ann:
        with here.noted(Kind.NODE, HOST, int(ann.rpartition(":")[2])):
            async with Members(cluster, cluster.issue("me")) as members:
                assert not await members.ask_here()
                assert [info.name for info, _ in await members.nodes()] == ["ann"]


@pytest.mark.parametrize(("stages", "nothing"), [(0, True), (1, False)])
async def test_nothing_is_served_where_no_machine_has_a_stage(
    cluster: Cluster, tmp_path: Path, stages: int, nothing: bool
) -> None:
    async with (
        agent(cluster, "cid", stages=stages) as cid,
        agent(cluster, "bob", peers=[cid]) as bob,
        agent(cluster, "ann", peers=[bob]) as ann,
    ):
        note(tmp_path, ann)
        assert await idle(cluster) is nothing


async def test_whether_anything_is_served_is_not_known(cluster: Cluster, tmp_path: Path) -> None:
    assert not await idle(None)
    assert not await idle(cluster)  # no agent here
    async with agent(cluster, "ann", peers=[NOBODY]) as silent:
        note(tmp_path, silent)
        assert not await idle(cluster)
    async with agent(Cluster.new(), "ann") as strange:
        note(tmp_path, strange)
        assert not await idle(cluster)
