"""Certificates that renew themselves, on ports and channels of this process."""

import asyncio
import errno
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from coordinator.serving.metrics_port import metrics_port
from node.doctor.certificates import client_side
from tests.support.cluster import until
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.cluster.standing import authorities, kept_known
from unicluster.errors import InputError, TrustError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import LIFETIME_VARIABLE, Credentials, lifetime, new_key
from unicluster.trust.keyring import Keyring, Membership
from unicluster.trust.store import Store
from unicluster.v1.chat_pb2 import Measured

HOST = "127.0.0.1"
METHOD = "/unicluster.v1.Node/Describe"
STREAM = "/unicluster.v1.Stage/Hop"
SHORT = 2.0


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIFETIME_VARIABLE, f"{SHORT:g}")


class _Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def unary(request: bytes, context: Any) -> bytes:
            return request

        async def stream(request: Any, context: Any) -> None:
            async for message in request:
                await context.write(message)

        if details.method == STREAM:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


def test_a_certificate_is_issued_anew_at_half_of_its_life(short_lives: None) -> None:
    keyring = Keyring.of_member(Membership(Cluster.new()), "studio")
    first = keyring.current

    assert keyring.current is first
    until(lambda: keyring.current is not first, "renewed")

    now = keyring.current
    assert first.expires_s > time.time(), "it was renewed before it expired"
    assert now.expires_s > first.expires_s
    assert now.has_key_of(first.cert_pem.encode())


async def test_a_port_and_its_callers_outlive_their_certificates(short_lives: None) -> None:
    """A stream goes on, and new channels get in, three lifetimes long."""
    cluster = Cluster.new()
    keyring = Keyring.of_member(Membership(cluster), "laptop")
    stale = cluster.issue("forgotten")
    server = make_server()
    server.add_generic_rpc_handlers([_Echo()])
    port = bind(server, HOST, 0, Keyring.of_member(Membership(cluster), "server"))
    await server.start()
    try:
        async with connect(f"{HOST}:{port}", keyring) as lasting:
            call: Any = lasting.stream_stream(STREAM)()
            end = time.monotonic() + 3 * SHORT
            answers = 0
            while time.monotonic() < end:
                await call.write(b"frame")
                assert await asyncio.wait_for(call.read(), 5) == b"frame"
                async with connect(f"{HOST}:{port}", keyring) as fresh:
                    assert await fresh.unary_unary(METHOD)(b"x", timeout=5) == b"x"
                answers += 1
            call.cancel()
        async with connect(f"{HOST}:{port}", stale) as refused:
            with pytest.raises(grpc.RpcError):
                await refused.unary_unary(METHOD)(b"x", timeout=5)
    finally:
        await server.stop(grace=None)
    assert answers > 3


async def test_who_hands_certificates_on_gets_each_of_them(short_lives: None) -> None:
    keyring = Keyring.of_member(Membership(Cluster.new()), "studio")
    renewals = keyring.renewals()

    async with asyncio.timeout(10):
        first, second = await anext(renewals), await anext(renewals)

    assert second.expires_s > first.expires_s


def test_certificates_live_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIFETIME_VARIABLE, raising=False)
    left = Cluster.new().issue("studio").expires_s - time.time()

    assert 2 < left / 86400 <= 3


@pytest.mark.parametrize("setting", ["soon", "0", "-1", "1e12", "nan"])
def test_a_bad_lifetime_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(LIFETIME_VARIABLE, setting)

    with pytest.raises(InputError, match=LIFETIME_VARIABLE):
        lifetime()


# Rotation


async def outcome(address: str, identity: Credentials) -> grpc.StatusCode:
    async with connect(address, identity) as channel:
        try:
            await channel.unary_unary(METHOD)(b"x", timeout=5)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_in_a_rotation_both_generations_are_good_and_after_it_one(tmp_path: Path) -> None:
    """Members and servers in every pairing; a client that knows the old generation gets in, too.

    Connections that stand end with their generation, unless their holder shows that it has moved.
    """
    store = Store(tmp_path)
    old = store.create()
    membership = Membership(old, store)
    server = make_server()
    server.add_generic_rpc_handlers([_Echo()])
    keyring = Keyring.of_member(membership, "server")
    port = bind(server, HOST, 0, keyring, admitted=membership.clients_ca_pem)
    behind = make_server()
    behind.add_generic_rpc_handlers([_Echo()])
    unmoved = bind(behind, HOST, 0, Keyring.of_member(Membership(old), "behind"))
    await server.start()
    await behind.start()
    here, there = f"{HOST}:{port}", f"{HOST}:{unmoved}"
    refused, good = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK
    no_client = grpc.StatusCode.PERMISSION_DENIED  # known as a client, and so let in
    try:
        moving = Keyring.of_member(membership, "moving")

        async def show() -> None:
            assert await outcome(here, moving) is good

        async with (
            connect(here, old.issue("before")) as stolen,
            connect(here, moving) as lasting,
            kept_known(moving, show),
        ):
            call: Any = lasting.stream_stream(STREAM)()
            thief: Any = stolen.stream_stream(STREAM)()
            for each in (call, thief):
                await each.write(b"frame")
                assert await asyncio.wait_for(each.read(), 5) == b"frame"
            new = store.rotate()
            until(lambda: membership.generations == (new, old), "the store was looked at")
            during = [await outcome(here, c.issue("a")) for c in (old, new)]
            clients = [await outcome(here, c.client_access.issue("a")) for c in (old, new)]
            mover = await outcome(there, keyring)
            store.finish_rotation()
            until(lambda: membership.generations == (new,), "the store was looked at")
            after = [await outcome(here, c.issue("a")) for c in (old, new)]
            clients_after = [await outcome(here, c.client_access.issue("a")) for c in (old, new)]
            assert await asyncio.wait_for(thief.code(), 10) is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as again:
                await stolen.unary_unary(METHOD)(b"x", timeout=5)
            await call.write(b"frame")
            assert await asyncio.wait_for(call.read(), 5) == b"frame"
            assert await lasting.unary_unary(METHOD)(b"x", timeout=5) == b"x"
            call.cancel()
    finally:
        await server.stop(grace=None)
        await behind.stop(grace=None)
    assert again.value.code() is grpc.StatusCode.UNAUTHENTICATED

    assert during == [good, good]
    assert clients == [no_client, no_client]
    assert mover is good
    assert after == [refused, good]
    assert clients_after == [refused, no_client]


def test_a_rotation_begins_once_and_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.create()
    new = store.rotate()

    begun = store.rotation_begun()
    assert begun is not None
    assert abs(time.time() - begun) < 60
    assert store.generations() == (new, old)
    assert store.rotate(new) == new
    with pytest.raises(TrustError, match="--finish"):
        store.rotate()
    store.finish_rotation()
    assert store.generations() == (new,)
    assert store.rotation_begun() is None
    assert store.join(old.token) == new, "a unit that starts again names the token of old"
    with pytest.raises(TrustError, match="to change over"):
        store.join(Cluster.new().token)


def test_a_token_that_can_t_be_replaced_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Docker mounts the file by itself: then the old token stays, alone."""
    store = Store(tmp_path)
    old = store.create()
    replace = Path.replace

    def busy(source: Path, target: Path) -> Path:
        if target == store.path:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(TrustError, match=r"mounted by itself.*--token-file"):
        store.rotate()

    assert store.generations() == (old,)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.token"]


async def test_a_client_follows_a_rotation_and_so_do_scrapers(tmp_path: Path) -> None:
    """The metrics port admits scrapers of both generations, then of the new one alone."""
    store = Store(tmp_path)
    old = store.create()
    client = Keyring.of_access(store, "laptop")
    membership = Membership(old, store)

    async def measure() -> Measured:
        return Measured()

    def scrape(cluster: Cluster) -> str:
        identity = cluster.scrapers.issue("scraper", 60, membership.issue("x", new_key()).ca_pem)
        context = client_side(identity)
        try:
            with (
                socket.create_connection((HOST, port), 10) as plain,
                context.wrap_socket(plain) as secured,
            ):
                secured.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                return b"".join(iter(lambda: secured.recv(65536), b"")).decode()
        except OSError:
            return ""

    async with metrics_port(membership, HOST, 0, measure) as port:
        before = client.current
        assert old.fingerprint in await asyncio.to_thread(scrape, old)
        new = store.rotate()
        until(lambda: len(membership.generations) == 2, "the store was looked at")
        during = [await asyncio.to_thread(scrape, each) for each in (old, new)]
        store.finish_rotation()
        until(lambda: len(membership.generations) == 1, "the store was looked at")
        after = [await asyncio.to_thread(scrape, each) for each in (old, new)]

    for page in during:
        assert f'unicluster_authority_seconds_left{{cluster="{old.fingerprint}"}}' in page
        assert f'unicluster_authority_seconds_left{{cluster="{new.fingerprint}"}}' in page
        assert "unicluster_certificate_seconds_left" in page
    assert after[0] == ""
    assert new.fingerprint in after[1]
    assert old.fingerprint not in after[1]
    assert client.current is not before
    assert authorities(client.current.ca_pem) == authorities(new.ca_pem)
