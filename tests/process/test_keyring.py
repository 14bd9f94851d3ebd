"""Certificates that renew themselves, on ports and channels of this process."""

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.support.cluster import until
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.cluster.keyring import Keyring
from unicluster.cluster.trust import LIFETIME_VARIABLE, Cluster, lifetime
from unicluster.errors import InputError

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
    keyring = Keyring.of_member(Cluster.new(), "studio")
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
    keyring = Keyring.of_member(cluster, "laptop")
    stale = cluster.issue("forgotten")
    server = make_server()
    server.add_generic_rpc_handlers([_Echo()])
    port = bind(server, HOST, 0, Keyring.of_member(cluster, "server"))
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
    keyring = Keyring.of_member(Cluster.new(), "studio")
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
