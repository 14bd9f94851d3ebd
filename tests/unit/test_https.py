"""HTTPS by the cluster's own authority: whom its clients take for the door, and for how long."""

import asyncio
import ssl
from pathlib import Path

import grpc
import httpx
import pytest

from coordinator.api.certificate import ClusterTls, names_here
from tests.support.deadlines import scaled
from tests.support.http_door import Door, http_door
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.errors import InputError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import LIFETIME_VARIABLE, new_key
from unicluster.trust.keyring import Membership
from unicluster.trust.store import Store

HOST = "127.0.0.1"
SHORT = 4.0


def trusting(ca_pem: str) -> ssl.SSLContext:
    """The strictest of what clients check."""
    context = ssl.create_default_context(cadata=ca_pem)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


async def status(door: Door, ca_pem: str, host: str = HOST) -> int:
    url = door.url.replace(HOST, host)
    async with httpx.AsyncClient(verify=trusting(ca_pem), timeout=scaled(10)) as client:
        return (await client.get(f"{url}/healthz")).status_code


async def serial(door: Door, ca_pem: str) -> str:
    """Serial number of the certificate that a new connection is shown."""
    port = int(door.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection(HOST, port, ssl=trusting(ca_pem))
    shown = writer.get_extra_info("peercert")
    writer.close()
    return str(shown["serialNumber"])


async def test_who_trusts_the_authority_knows_the_door_by_each_of_its_names() -> None:
    cluster = Cluster.new()
    tls = ClusterTls(Membership(cluster), names_here(["Chat.example"]))
    async with http_door(tls=tls.context) as door:
        for ca_pem in (cluster.ca_pem, cluster.client_access.member_ca_pem):
            assert await status(door, ca_pem) == 200
            assert await status(door, ca_pem, "localhost") == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await status(door, Cluster.new().ca_pem)
        where = (HOST, int(door.url.rpartition(":")[2]))
        shown = await asyncio.to_thread(ssl.get_server_certificate, where)

    names = ssl.PEM_cert_to_DER_cert(shown)
    assert b"chat.example" in names


async def test_the_certificate_is_renewed_while_the_door_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LIFETIME_VARIABLE, f"{SHORT:g}")
    cluster = Cluster.new()
    async with http_door(tls=ClusterTls(Membership(cluster), ()).context) as door:
        first = await serial(door, cluster.ca_pem)
        async with asyncio.timeout(scaled(30)):
            while await serial(door, cluster.ca_pem) == first:
                pass
        assert await status(door, cluster.ca_pem) == 200


async def test_a_rotated_token_interrupts_nobody_who_trusts_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.create()
    async with http_door(tls=ClusterTls(Membership(old, store), ()).context) as door:
        new = store.rotate()
        async with asyncio.timeout(scaled(30)):
            while True:
                try:
                    assert await status(door, new.ca_pem) == 200
                    break
                except httpx.ConnectError:
                    continue
        assert await status(door, old.ca_pem) == 200
        assert len(store.authorities()) == 2
        assert await status(door, "".join(store.authorities())) == 200


async def test_it_opens_no_port_of_the_cluster_and_passes_for_none() -> None:
    cluster = Cluster.new()
    of_door = Membership(cluster).issue_for_hosts("studio", [HOST], new_key())
    server, posing = make_server(), make_server()
    member_port = bind(server, HOST, 0, cluster.issue("ann"))
    door_port = bind(posing, HOST, 0, of_door)
    await server.start()
    await posing.start()
    try:
        for port, identity in ((member_port, of_door), (door_port, cluster.issue("bob"))):
            channel = connect(f"{HOST}:{port}", identity)
            call = channel.unary_unary("/unicluster.v1.Node/Describe")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=scaled(5))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            await channel.close()
    finally:
        await server.stop(None)
        await posing.stop(None)


def test_what_can_be_no_name_is_refused_and_others_are_as_they_are_sent() -> None:
    assert "xn--bro-hoa.example" in names_here(["Büro.example"])
    for bad in ("a..b", "x" * 64):
        with pytest.raises(InputError, match="--http-name"):
            names_here([bad])
