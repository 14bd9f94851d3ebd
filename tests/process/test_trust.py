"""Tokens, certificates and channels: real TLS between real processes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.deadlines import scaled
from unicluster.cluster.channels import (
    CHANNEL_OPTIONS,
    as_error,
    bind,
    connect,
    connect_sync,
    join_address,
    make_server,
    split_address,
    status_of,
)
from unicluster.errors import (
    BusyError,
    InputError,
    NotFoundError,
    StageError,
    TrustError,
    UnavailableError,
    UniclusterError,
)
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Identity, check_name, default_name
from unicluster.trust.store import Store

# python -c SERVER: reads the token from stdin, serves /test/Echo and /test/Who at a free port of
# all addresses, prints the port, and logs to stderr.
SERVER = """
import logging
logging.basicConfig(level=logging.DEBUG, format="LOG %(message)s")
import asyncio, sys
import grpc
from unicluster.cluster.channels import bind, make_server, peer_name
from unicluster.trust.cluster import Cluster

async def echo(messages, context):
    async for message in messages:
        yield message

async def who(message, context):
    print(f"asked by {peer_name(context)}", file=sys.stderr, flush=True)
    return peer_name(context).encode()

async def main():
    server = make_server(most_bytes=64 << 20)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
        "Who": grpc.unary_unary_rpc_method_handler(who),
    })])
    identity = Cluster.from_token(sys.stdin.readline()).issue("server")
    print(bind(server, "", 0, identity), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""


@dataclass
class Server:
    cluster: Cluster
    process: asyncio.subprocess.Process
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def log_until(self, text: str) -> str:
        """Its log up to a line with `text`."""
        assert self.process.stderr is not None
        lines = []
        async with asyncio.timeout(scaled(10)):
            while not lines or text not in lines[-1]:
                line = await self.process.stderr.readline()
                assert line, f"the log ended without {text!r}: {lines}"
                lines.append(line.decode())
        return "".join(lines)

    async def assert_only_members_were_heard(self) -> None:
        """A member asks, and its question is the first that came."""
        async with connect(self.address, self.cluster.issue("laptop")) as channel:
            await ask_who(channel)
        first = (await self.log_until("asked by")).splitlines()[-1]
        assert first.startswith("asked by laptop (")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    cluster = Cluster.new()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{cluster.token}\n".encode())
        async with asyncio.timeout(scaled(15)):
            port = int(await process.stdout.readline())
        yield Server(cluster, process, port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ask_who(channel: grpc.aio.Channel) -> str:
    answer: bytes = await channel.unary_unary("/test/Who")(b"", timeout=scaled(5))
    return answer.decode()


async def refusal(channel: grpc.aio.Channel) -> UniclusterError:
    """The error of a client that is refused."""
    async with channel:
        with pytest.raises(grpc.RpcError) as caught:
            await ask_who(channel)
    return as_error(caught.value, "server")


# Tokens


def test_a_token_holds_the_cluster() -> None:
    cluster = Cluster.new()

    assert cluster.token.startswith("uc1-")
    assert Cluster.from_token(cluster.token) == cluster
    assert Cluster.from_token(f"  {cluster.token.upper()}\n") == cluster


def test_a_mistyped_token_is_refused_and_not_repeated() -> None:
    token = Cluster.new().token
    for position in range(4, len(token)):
        wrong = "a" if token[position] != "a" else "b"
        mistyped = token[:position] + wrong + token[position + 1 :]

        with pytest.raises(TrustError, match="mistyped") as caught:
            Cluster.from_token(mistyped)

        assert mistyped[4:] not in str(caught.value)


@pytest.mark.parametrize("token", ["", "uc1-", "uc1-abc", "hello", "uc1-" + "a" * 500, "uc1-ä"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(TrustError, match="unicluster token show"):
        Cluster.from_token(token)


def test_nothing_that_is_printed_shows_the_secret() -> None:
    cluster = Cluster.new()
    identity = cluster.issue("studio")
    printed = f"{cluster!r} {cluster} {identity!r} {cluster.fingerprint} {identity.cert_pem}"

    assert cluster.token[4:] not in printed
    assert cluster.secret.hex() not in printed
    assert "PRIVATE KEY" not in printed


def test_fingerprints_are_short_and_tell_clusters_apart() -> None:
    cluster = Cluster.new()

    assert len(cluster.fingerprint) == 16
    assert Cluster.from_token(cluster.token).fingerprint == cluster.fingerprint
    assert Cluster.new().fingerprint != cluster.fingerprint


# Names


@pytest.mark.parametrize("name", ["", "-a", "a b", "a.b", "ä", "x" * 49, "a\n"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="can't name a machine"):
        check_name(name)


def test_the_default_name_is_allowed() -> None:
    assert check_name(default_name())


# The store


def test_a_store_keeps_the_cluster(tmp_path: Path) -> None:
    cluster = Store(tmp_path).create()

    assert Store(tmp_path).load() == cluster
    assert Store(tmp_path).require() == cluster


def test_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")

    assert store.load() is None
    with pytest.raises(TrustError, match="unicluster join"):
        store.require()
    with pytest.raises(TrustError, match="unicluster join"):
        store.rotate()
    assert not store.folder.exists()


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    for change in (
        store.create,
        store.rotate,
        lambda: store.join(Cluster.new().token, replace=True),
    ):
        change()
        assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
        assert {path.name for path in store.folder.iterdir()} <= {
            store.path.name,
            store.old_path.name,
            store.past_path.name,
        }
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in store.folder.iterdir())


def test_a_store_that_others_can_read_is_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    cluster = store.create()
    store.path.chmod(0o644)

    assert store.load() == cluster
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert "readable by others" in caplog.text


@pytest.mark.parametrize("content", [b"", b"uc1-broken", b"\xff\xfe"])
def test_a_damaged_store_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.create()
    store.path.write_bytes(content)

    with pytest.raises(TrustError, match=r"cluster\.token is damaged: delete it"):
        store.load()


def test_another_cluster_is_not_replaced_by_chance(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cluster = store.create()
    other = Cluster.new()

    assert store.join(cluster.token) == cluster
    with pytest.raises(TrustError, match=other.fingerprint):
        store.join(other.token)
    assert store.load() == cluster
    assert store.join(other.token, replace=True) == other
    assert store.load() == other


def test_creating_never_replaces(tmp_path: Path) -> None:
    cluster = Store(tmp_path).create()

    with pytest.raises(TrustError, match="in a cluster already"):
        Store(tmp_path).create()
    assert Store(tmp_path).load_or_create() == (cluster, False)


def test_agents_that_start_together_end_up_in_one_cluster(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from unicluster.trust.store import Store;"
        "sys.stdin.read(); print(Store(Path(sys.argv[1])).load_or_create()[0].fingerprint)"
    )
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]

    outputs = [agent.communicate(timeout=scaled(20))[0] for agent in agents]

    assert len(set(outputs)) == 1
    assert len(outputs[0].strip()) == 16


def test_the_default_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path / "mine"))
    assert Store().folder == tmp_path / "mine"

    monkeypatch.delenv("UNICLUSTER_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Store().folder == tmp_path / "unicluster"

    monkeypatch.setattr(sys, "platform", "darwin")
    assert Store().folder == Path.home() / "Library" / "Application Support" / "unicluster"


# Certificates


async def test_members_that_derive_the_authority_apart_trust_each_other(server: Server) -> None:
    member = Cluster.from_token(server.cluster.token)

    async with connect(server.address, member.issue("laptop")) as channel:
        assert (await ask_who(channel)).startswith("laptop (127.0.0.1:")


async def test_an_identity_travels_through_a_pipe(server: Server) -> None:
    identity = server.cluster.issue("laptop")
    copy = Identity.from_dict(json.loads(json.dumps(identity.to_dict())))

    assert copy == identity
    async with connect(server.address, copy) as channel:
        assert (await ask_who(channel)).startswith("laptop ")


async def test_ipv6_and_host_names_work_too(server: Server) -> None:
    identity = server.cluster.issue("laptop")
    async with connect(f"[::1]:{server.port}", identity) as channel:
        assert (await ask_who(channel)).startswith("laptop ([::1]:")
    async with connect(f"localhost:{server.port}", identity) as channel:
        assert (await ask_who(channel)).startswith("laptop (")


def test_a_program_without_an_event_loop_connects(server: Server) -> None:
    with connect_sync(server.address, server.cluster.issue("script")) as channel:
        assert channel.unary_unary("/test/Who")(b"", timeout=scaled(5)).startswith(b"script (")


async def test_a_client_without_a_certificate_is_refused(server: Server) -> None:
    credentials = grpc.ssl_channel_credentials(server.cluster.ca_pem.encode())
    channel = grpc.aio.secure_channel(server.address, credentials, options=CHANNEL_OPTIONS)

    assert "hangs up" in str(await refusal(channel))
    await server.assert_only_members_were_heard()


async def test_a_client_with_an_expired_certificate_is_refused(server: Server) -> None:
    expired = server.cluster.issue("old", valid_seconds=-60)

    assert "certificate" in str(await refusal(connect(server.address, expired)))
    await server.assert_only_members_were_heard()


async def test_a_client_with_another_clusters_certificate_is_refused(server: Server) -> None:
    """One that trusts our authority none the less, so that it comes as far as it can."""
    foreign = Cluster.new().issue("stranger").to_dict() | {"ca_pem": server.cluster.ca_pem}

    await refusal(connect(server.address, Identity.from_dict(foreign)))
    await server.assert_only_members_were_heard()


async def test_a_member_of_another_cluster_is_refused(server: Server) -> None:
    error = await refusal(connect(server.address, Cluster.new().issue("stranger")))

    assert isinstance(error, TrustError)
    assert str(error) == "server has no certificate of this cluster"
    await server.assert_only_members_were_heard()


async def test_a_client_without_tls_is_refused(server: Server) -> None:
    await refusal(grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS))

    await server.assert_only_members_were_heard()


async def test_a_flood_of_strangers_does_not_stop_the_server(server: Server) -> None:
    async def knock() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    await asyncio.wait_for(asyncio.gather(*(knock() for _ in range(100))), timeout=scaled(10))

    async with connect(server.address, server.cluster.issue("laptop")) as channel:
        assert (await ask_who(channel)).startswith("laptop ")


async def test_the_log_holds_our_lines_only_and_no_secret(server: Server) -> None:
    for identity in (
        server.cluster.issue("old", valid_seconds=-60),
        Cluster.new().issue("stranger"),
        server.cluster.issue("laptop"),
    ):
        async with connect(server.address, identity) as channel:
            with contextlib.suppress(grpc.RpcError):
                await ask_who(channel)

    log = await server.log_until("asked")
    for line in log.splitlines():
        assert line.startswith(("LOG ", "asked by laptop ("))
    assert server.cluster.token[4:] not in log


# Channels


async def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is taken: .* --port"):
            bind(make_server(), "127.0.0.1", port, Cluster.new().issue("a"))


async def test_two_servers_do_not_share_a_port() -> None:
    identity = Cluster.new().issue("a")
    first = make_server()
    port = bind(first, "", 0, identity)
    await first.start()
    try:
        for host in ("", "0.0.0.0", "127.0.0.1", "::"):
            with pytest.raises(InputError, match="is taken"):
                bind(make_server(), host, port, identity)
    finally:
        await first.stop(None)


@pytest.mark.parametrize("host", ["192.0.2.254", "no such host"])
async def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="--host"):
        bind(make_server(), host, 0, Cluster.new().issue("a"))


async def test_a_silent_peer_is_noticed_within_four_seconds(server: Server) -> None:
    """Slow: it has to wait for the keepalive. A stopped process acknowledges TCP, and no more."""
    async with connect(server.address, server.cluster.issue("laptop")) as channel:
        call = channel.stream_stream("/test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"

        server.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(call.read(), timeout=scaled(10))

        assert time.monotonic() - start < scaled(4.5)
        assert str(as_error(caught.value, "server")) == "server stopped answering"


async def test_an_idle_stream_outlives_many_pings(server: Server) -> None:
    """Slow: a server that finds pings too many hangs up at the third, after 3 seconds."""
    async with connect(server.address, server.cluster.issue("laptop")) as channel:
        call = channel.stream_stream("/test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.read())), timeout=5)

        assert not call.done()


async def test_a_killed_peer_is_noticed_at_once(server: Server) -> None:
    async with connect(server.address, server.cluster.issue("laptop")) as channel:
        call = channel.stream_stream("/test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"

        server.process.kill()
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(call.read(), timeout=scaled(2))

        assert isinstance(as_error(caught.value, "server"), UnavailableError)


async def test_long_messages_pass(server: Server) -> None:
    message = os.urandom(32 << 20)
    identity = server.cluster.issue("laptop")
    async with connect(server.address, identity, most_bytes=64 << 20) as channel:
        call = channel.stream_stream("/test/Echo")()
        await call.write(message)
        assert await call.read() == message


async def test_nobody_there(unused_tcp_port: int) -> None:
    error = await refusal(connect(f"127.0.0.1:{unused_tcp_port}", Cluster.new().issue("a")))

    assert isinstance(error, UnavailableError)
    assert str(error) == "server refuses connections: is it still running?"


@pytest.mark.parametrize(
    "error", [InputError, BusyError, NotFoundError, StageError, TrustError, UnavailableError]
)
async def test_an_error_is_the_same_on_both_sides(error: type[UniclusterError]) -> None:
    cluster = Cluster.new()

    async def fail(request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        await context.abort(status_of(error("x")), "max_tokens: must be positive")
        return b""

    server = make_server()
    handlers = {"Who": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = bind(server, "127.0.0.1", 0, cluster.issue("server"))
    await server.start()
    try:
        told = await refusal(connect(f"127.0.0.1:{port}", cluster.issue("laptop")))
    finally:
        await server.stop(None)

    assert type(told) is error
    assert str(told) == "max_tokens: must be positive"


def test_addresses() -> None:
    assert split_address("studio.local:7000") == ("studio.local", 7000)
    assert split_address("[::1]:7000") == ("::1", 7000)
    assert join_address("::1", 7000) == "[::1]:7000"
    assert join_address("10.0.0.1", 7000) == "10.0.0.1:7000"


@pytest.mark.parametrize("address", ["", "host", "host:", ":7000", "host:0", "host:70000", "::1:7"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        split_address(address)
