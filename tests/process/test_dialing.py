"""Several addresses of one machine: who answers, which one is used, and what is said of others."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from unicluster.cluster.channels import bind, make_server
from unicluster.dialing.dialer import Dialer, History, Reached
from unicluster.errors import TrustError, UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.v1.stage_pb2 import RouteStop

HOST = "127.0.0.1"


class Machines:
    """Servers of a cluster's machines, and the dialer of another one."""

    def __init__(self) -> None:
        self.cluster = Cluster.new()
        self.seen = History()
        self.dialer = Dialer(self.cluster.issue("asking"), self.seen)
        self._servers: list[grpc.aio.Server] = []

    async def start(self, name: str, cluster: Cluster | None = None) -> tuple[str, str]:
        """Its address and its id."""
        server = make_server()
        identity = (cluster or self.cluster).issue(name)
        port = bind(server, HOST, 0, identity)
        await server.start()
        self._servers.append(server)
        return f"{HOST}:{port}", identity.machine

    async def close(self) -> None:
        for server in self._servers:
            await server.stop(None)


@pytest.fixture
async def machines() -> AsyncIterator[Machines]:
    made = Machines()
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """Accepts connections and says nothing."""
    with socket.create_server((HOST, 0)) as listening:
        yield f"{HOST}:{listening.getsockname()[1]}"


async def test_the_one_that_is_meant_is_reached_whatever_else_answers(machines: Machines) -> None:
    bob, machine = await machines.start("bob")
    ann, _ = await machines.start("ann")
    stranger, _ = await machines.start("bob", Cluster.new())
    async with mute() as silent:
        addresses = [silent, ann, f"{HOST}:9", stranger, bob]

        reached = await machines.dialer.reach(addresses, "machine bob", name="bob")

    assert reached == Reached(bob, "bob", machine, is_pinned=True)


async def test_what_happened_at_each_address_is_said(machines: Machines) -> None:
    ann, _ = await machines.start("ann")
    stranger, _ = await machines.start("bob", Cluster.new())

    with pytest.raises(UnavailableError) as error:
        await machines.dialer.reach(
            [ann, f"{HOST}:9", stranger, "no.such.host.invalid:1"], "machine bob", name="bob"
        )

    message = str(error.value)
    assert message.startswith("machine bob can't be reached: ")
    assert f"{ann} answers as ann" in message
    assert f"{HOST}:9 refuses connections" in message
    assert f"{stranger} has no certificate of this cluster" in message
    assert "no.such.host.invalid:1 has a name that can't be resolved" in message


async def test_a_stranger_alone_is_an_error_of_trust(machines: Machines) -> None:
    stranger, _ = await machines.start("bob", Cluster.new())

    with pytest.raises(TrustError, match=r"machine bob .* has no certificate of this cluster"):
        await machines.dialer.reach([stranger], "machine bob")


async def test_another_machine_of_the_name_is_not_that_machine(machines: Machines) -> None:
    first, machine = await machines.start("bob")
    second, other = await machines.start("bob")

    reached = await machines.dialer.reach([second, first], "bob", name="bob", machine=machine)
    await machines.dialer.look([first, second])

    assert reached.address == first
    assert machines.seen.who("bob", [first, second]) == {machine: first, other: second}
    with pytest.raises(UnavailableError, match="answers as another machine, bob"):
        await machines.dialer.reach([second], "bob", machine=machine)


async def test_a_channel_lets_no_other_machine_answer(machines: Machines) -> None:
    """One that takes the address over later."""
    bob, machine = await machines.start("bob")
    reached = await machines.dialer.reach([bob], "bob", machine=machine)
    other = Reached(reached.address, "bob", "0" * 32, is_pinned=True)

    async with machines.dialer.connect(reached) as right:
        await asyncio.wait_for(right.channel_ready(), 10)
    async with machines.dialer.connect(other) as wrong:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wrong.channel_ready(), 1)


async def test_what_answered_comes_first_and_what_failed_last(machines: Machines) -> None:
    bob, _ = await machines.start("bob")
    async with mute() as silent:
        addresses = [silent, f"{HOST}:9", bob]
        await machines.dialer.reach(addresses, "bob")

        assert machines.seen.in_order(addresses)[0] == bob


async def test_what_packets_came_from_comes_before_what_is_only_said(machines: Machines) -> None:
    machines.seen.heard(f"{HOST}:7")

    assert machines.seen.in_order([f"{HOST}:{port}" for port in (5, 6, 7)])[0] == f"{HOST}:7"


async def test_a_stop_of_a_route_is_reached_at_any_of_its_addresses(machines: Machines) -> None:
    bob, machine = await machines.start("bob")
    stop = RouteStop(node="bob", address=f"{HOST}:9", addresses=[f"{HOST}:9", bob], machine=machine)

    channel, at = await machines.dialer.connect_stop(stop)

    await channel.close()
    assert at.address == bob


async def test_a_stop_of_an_older_machine_has_one(machines: Machines) -> None:
    bob, _ = await machines.start("bob")

    channel, at = await machines.dialer.connect_stop(RouteStop(node="bob", address=bob))

    await channel.close()
    assert at.address == bob


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicluster.dialing.dialer.MOST_REMEMBERED", 10)
    seen = History()
    for port in range(1, 100):
        seen.heard(f"{HOST}:{port}")
        seen.slow(f"{HOST}:{port}")

    assert len(seen._heard) == len(seen._tried) == 10
