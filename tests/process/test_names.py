"""Two machines of one name: refused or reported with both addresses, whoever meets them."""

import logging
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from coordinator.fleet.members import Members
from node.agent.peers import Peers
from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__
from unicluster.cluster.channels import bind, make_server
from unicluster.cluster.discovery import Advertisement, Browser
from unicluster.cluster.records import Kind, ServiceRecord
from unicluster.dialing.dialer import Dialer
from unicluster.errors import BusyError, InputError
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import DRAIN_ORDERS_NONE, DescribeNodeRequest, DrainRequest, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server

HOST = "127.0.0.1"


class Described(NodeServicer):
    """An agent that calls itself whatever it likes."""

    def __init__(self, name: str, bandwidth: float = 0.0) -> None:
        self._name = name
        self._bandwidth = bandwidth

    async def Describe(  # noqa: N802
        self, request: DescribeNodeRequest, context: Any
    ) -> NodeInfo:
        return NodeInfo(
            name=self._name,
            bandwidth=self._bandwidth,
            version=__version__,
            protocol=PROTOCOL,
            oldest_protocol=OLDEST_PROTOCOL,
            addresses=["evil\x1b[2J:1", "10.0.0.1:0", f"{HOST}:9"],
            drain_orders=DRAIN_ORDERS_NONE,
        )

    async def Drain(self, request: DrainRequest, context: Any) -> NodeInfo:  # noqa: N802
        """Here it lies."""
        return NodeInfo(name="another", bandwidth=math.inf)


class Drained:
    """A state file in which every machine is drained."""

    def follow(self, name: str, machine: str, *, drained: bool, ordered: bool | None) -> bool:
        return not drained and ordered is False


class Agents:
    """Agents of one cluster, each with a key of its own."""

    def __init__(self) -> None:
        self.cluster = Cluster.new()
        self._servers: list[grpc.aio.Server] = []

    async def start(self, name: str, says: str = "", bandwidth: float = 0.0) -> str:
        """Its address."""
        server = make_server()
        add_NodeServicer_to_server(Described(says or name, bandwidth), server)
        port = bind(server, HOST, 0, self.cluster.issue(name))
        await server.start()
        self._servers.append(server)
        return f"{HOST}:{port}"

    def members(self, *records: ServiceRecord, peers: tuple[str, ...] = ()) -> Members:
        """A coordinator's view, in which multicast brought `records`."""
        members = Members(self.cluster, self.cluster.issue("coordinator"), peers, HOST)
        members._browser.found = {record.name: record for record in records}
        return members

    def record(self, name: str, *addresses: str) -> ServiceRecord:
        return ServiceRecord(name, self.cluster.fingerprint, addresses)

    async def close(self) -> None:
        for server in self._servers:
            await server.stop(None)


@pytest.fixture
async def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agents]:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))  # machines are remembered there
    made = Agents()
    yield made
    await made.close()


async def test_members_report_both_and_stay_with_the_first(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await agents.start("studio"), await agents.start("studio")
    members = agents.members(agents.record("studio", first))
    assert [machine.address for machine in await members.machines()] == [first]

    members._browser.found["studio"] = agents.record("studio", second, first)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert [machine.address for machine in await members.machines()] == [first]

    (warning,) = [r.getMessage() for r in caplog.records if "are named studio" in r.getMessage()]
    assert first in warning
    assert second in warning


async def test_a_machine_that_was_made_anew_takes_its_name_over(agents: Agents) -> None:
    first = await agents.start("studio")
    members = agents.members(agents.record("studio", first))
    await members.machines()
    await agents.close()

    second = await agents.start("studio")
    members._browser.found["studio"] = agents.record("studio", first, second)

    assert [machine.address for machine in await members.machines()] == [second]


async def test_a_machine_that_is_drained_again_is_called_what_its_certificate_says(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    address = await agents.start("studio")
    members = agents.members(agents.record("studio", address))
    members._drains = Drained()

    (machine,) = await members.machines()

    assert machine.name == "studio"
    assert "studio" in caplog.text
    assert "could not be drained again" in caplog.text


async def test_a_machine_is_called_what_its_certificate_says(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    liar, honest = await agents.start("liar", says="studio"), await agents.start("studio")
    members = agents.members(agents.record("studio", liar, honest), peers=(liar,))

    machines = await members.machines()

    assert [(machine.name, machine.address) for machine in machines] == [("studio", honest)]
    assert f"machine liar ({liar}) calls itself 'studio'" in caplog.text


async def test_a_machine_that_states_nonsense_costs_only_itself(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    liar = await agents.start("liar", bandwidth=math.nan)
    honest = await agents.start("studio")
    members = agents.members(agents.record("studio", honest), peers=(liar,))

    assert [machine.name for machine in await members.machines()] == ["studio"]
    assert f"machine liar ({liar}) states a bandwidth of nan bytes per second" in caplog.text


async def test_addresses_that_can_not_be_are_not_believed(agents: Agents) -> None:
    studio = await agents.start("studio")

    (machine,) = await agents.members(agents.record("studio", studio)).machines()

    assert machine.addresses == (studio, f"{HOST}:9")


async def test_only_who_proves_it_has_a_name(agents: Agents) -> None:
    """A record of a stranger refuses nobody its name."""
    identity = agents.cluster.issue("studio")
    fingerprint = agents.cluster.fingerprint
    real = await agents.start("mini")
    dialer = Dialer(identity)

    assert await dialer.another_of("studio", [f"{HOST}:9", real]) == ""
    taken = await agents.start("studio")
    assert await dialer.another_of("studio", [f"{HOST}:9", real, taken]) == taken
    async with (
        Advertisement(Kind.NODE, "studio", 9, fingerprint, host=HOST),
        Advertisement(
            *(Kind.NODE, "studio", 10, fingerprint), host=HOST, who_has=dialer.another_of
        ),
    ):
        pass


def test_an_agent_refuses_the_second_of_a_name_with_both_addresses() -> None:
    peers = Peers((), Browser(Kind.NODE, "0" * 16, host=HOST))
    peers.note("studio", "1" * 32, ["10.0.0.1:47600"])
    peers.note("studio", "1" * 32, ["10.0.0.1:47600"])

    with pytest.raises(InputError, match=r"at 10.0.0.1:47600, and another .* from 10.0.0.2:47600"):
        peers.note("studio", "2" * 32, ["10.0.0.2:47600"])
    assert [list(each.addresses) for each in peers.known()] == [["10.0.0.1:47600"]]


def test_a_source_is_looked_for_at_all_addresses_of_its_machine() -> None:
    peers = Peers((), Browser(Kind.NODE, "0" * 16, host=HOST))
    peers.note("studio", "1" * 32, ["10.0.0.1:47600", "[fe80::1%eth0]:47600"])

    found = peers.elsewhere(["10.0.0.1:47600", "10.0.0.9:47600", "[fe80::9]:47600"])

    assert found == {"10.0.0.1:47600": ["[fe80::1]:47600"], "[fe80::9]:47600": []}


def test_who_greets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.agent.peers.MOST_GREETERS", 3)
    peers = Peers((), Browser(Kind.NODE, "0" * 16, host=HOST))
    for number in range(3):
        peers.note(f"m{number}", str(number), ["[fe80::1%eth0]:1"])

    with pytest.raises(BusyError):
        peers.note("m3", "3", ["10.0.0.1:1"])
    assert {address for each in peers.known() for address in each.addresses} == {"[fe80::1]:1"}
