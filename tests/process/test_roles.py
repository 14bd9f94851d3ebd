"""Who may call what: every method, by every role, over real TLS."""

import datetime
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.deadlines import scaled
from unicluster.cluster.channels import as_error, bind, connect, make_server
from unicluster.cluster.roles import WHO_MAY_CALL, who_may_call
from unicluster.errors import TrustError, UnavailableError
from unicluster.trust.cluster import ClientAccess, Cluster
from unicluster.trust.identity import Identity
from unicluster.trust.role import Role
from unicluster.trust.store import Store
from unicluster.v1 import (
    chat_pb2,
    control_pb2,
    meters_pb2,
    node_pb2,
    stage_pb2,
    tensor_pb2,
    weights_pb2,
)

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
WIRE = [chat_pb2, control_pb2, meters_pb2, node_pb2, stage_pb2, tensor_pb2, weights_pb2]
METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for module in WIRE
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def test_the_table_has_every_method() -> None:
    assert set(WHO_MAY_CALL) == {name for name, _ in METHODS}


def test_the_page_about_security_has_the_table() -> None:
    """To mend it: python -c "from unicluster.cluster.roles import *; print(who_may_call())"."""
    assert who_may_call() in (ROOT / "docs" / "security.md").read_text()


def test_clients_may_chat_and_ask_for_the_status_and_no_more() -> None:
    open_to_clients = {name for name, roles in WHO_MAY_CALL.items() if Role.CLIENT in roles}

    assert open_to_clients == {
        "/unicluster.v1.Chat/Generate",
        "/unicluster.v1.Chat/Continue",
        "/unicluster.v1.Chat/Abandon",
        "/unicluster.v1.Chat/Describe",
        "/unicluster.v1.Chat/Measure",
        "/unicluster.v1.Chat/CountTokens",
    }
    assert not any(Role.SCRAPER in roles for roles in WHO_MAY_CALL.values())
    assert all(Role.MEMBER in roles for roles in WHO_MAY_CALL.values())


class Doors:
    """A port that admits every role, with all services, and one like an agent's."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.called: list[str] = []
        self._servers: list[grpc.aio.Server] = []

    async def open(self, admitted_ca_pem: str) -> str:
        server = make_server()
        server.add_generic_rpc_handlers([_Everything(self.called)])
        identity = self.cluster.issue("server")
        port = bind(server, HOST, 0, identity, admitted=lambda: admitted_ca_pem)
        await server.start()
        self._servers.append(server)
        return f"{HOST}:{port}"

    async def close(self) -> None:
        for server in self._servers:
            await server.stop(grace=None)


class _Everything(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """Answers every method of the wire with nothing, as its kind demands."""

    def __init__(self, called: list[str]) -> None:
        self._called = called
        self._methods = dict(METHODS)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = self._methods.get(details.method)
        if method is None:
            return None

        async def unary(request: Any, context: Any) -> bytes:
            self._called.append(details.method)
            return b""

        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            self._called.append(details.method)
            yield b""

        async def write(request: Any, context: Any) -> None:
            self._called.append(details.method)
            await context.write(b"")

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(write)
        if method.server_streaming:  # one of each of the two ways to stream
            return grpc.unary_stream_rpc_method_handler(
                stream if method.name == "Generate" else write
            )
        return grpc.unary_unary_rpc_method_handler(unary)


@pytest.fixture
async def doors() -> AsyncIterator[Doors]:
    doors = Doors(Cluster.new())
    yield doors
    await doors.close()


def identity_of(cluster: Cluster, role: Role) -> Identity:
    if role is Role.CLIENT:
        return cluster.client_access.issue("laptop")
    if role is Role.SCRAPER:
        return cluster.scrapers.issue("prometheus", 3600, cluster.ca_pem)
    return cluster.issue("studio")


async def outcome(channel: grpc.aio.Channel, name: str, method: Any) -> grpc.StatusCode:
    """How a call with an empty request ends."""
    call: Any
    try:
        if method.client_streaming:
            call = channel.stream_stream(name)(iter([b""]), timeout=scaled(10))
        elif method.server_streaming:
            call = channel.unary_stream(name)(b"", timeout=scaled(10))
        else:
            await channel.unary_unary(name)(b"", timeout=scaled(10))
            return grpc.StatusCode.OK
        async for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("role", list(Role))
async def test_each_method_by_each_role(doors: Doors, role: Role) -> None:
    cluster = doors.cluster
    everyone = cluster.client_access.authority.ca_pem + cluster.scrapers.ca_pem
    address = await doors.open(everyone)

    async with connect(address, identity_of(cluster, role)) as channel:
        ended = {name: await outcome(channel, name, method) for name, method in METHODS}

    assert ended == {
        name: grpc.StatusCode.OK if role in roles else grpc.StatusCode.PERMISSION_DENIED
        for name, roles in WHO_MAY_CALL.items()
    }
    assert set(doors.called) == {name for name, roles in WHO_MAY_CALL.items() if role in roles}


async def test_who_is_refused_is_in_the_audit_log(
    doors: Doors, caplog: pytest.LogCaptureFixture
) -> None:
    address = await doors.open(doors.cluster.client_access.authority.ca_pem)

    async with connect(address, doors.cluster.client_access.issue("laptop")) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary("/unicluster.v1.Node/Drain")(b"", timeout=scaled(10))

    assert isinstance(as_error(caught.value, "server"), TrustError)
    assert "/unicluster.v1.Node/Drain is for the role member" in (caught.value.details() or "")
    (line,) = [record for record in caplog.records if record.name == "unicluster.audit"]
    assert "refused /unicluster.v1.Node/Drain to ipv4:127.0.0.1" in line.getMessage()


@pytest.mark.parametrize("role", [Role.CLIENT, Role.SCRAPER])
async def test_a_port_of_members_does_not_even_shake_hands_with_others(
    doors: Doors, role: Role
) -> None:
    address = await doors.open("")

    async with connect(address, identity_of(doors.cluster, role)) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary("/unicluster.v1.Chat/Describe")(b"", timeout=scaled(10))

    assert isinstance(as_error(caught.value, "server"), UnavailableError)
    assert doors.called == []


def forged(access: ClientAccess, issuer: str) -> Identity:
    """A certificate that the holder of a client token signs as it likes: it has that key."""
    authority_key = access.authority._key
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, "unicluster member"),
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "member"),
                ]
            )
        )
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("node.unicluster")]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
    honest = access.issue("laptop")
    return Identity("laptop", key_pem.decode(), cert_pem.decode(), honest.ca_pem)


async def test_a_client_can_not_sign_itself_a_member(doors: Doors) -> None:
    access = doors.cluster.client_access
    address = await doors.open(access.authority.ca_pem)
    names = [Role.CLIENT.authority_name(access.fingerprint)]
    names.append(Role.MEMBER.authority_name(access.fingerprint))
    ended = []

    for name in names:
        async with connect(address, forged(access, name)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary("/unicluster.v1.Node/Drain")(b"", timeout=scaled(10))
            ended.append(caught.value.code())

    # As a client it gets in and may not; as a member its signature is wrong.
    assert ended == [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE]
    assert doors.called == []


def authority_signed_by_a_client(access: ClientAccess, own: Cluster, issuer: str) -> str:
    """PEM of the members' authority of another cluster, signed with the key of the clients'."""
    key = own.members.public_key
    now = datetime.datetime.now(datetime.UTC)
    subject = Role.MEMBER.authority_name(own.fingerprint)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .sign(access.authority._key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


async def test_a_client_can_not_introduce_an_authority_of_members(doors: Doors) -> None:
    """As in a rotation the members' authority does with the next one."""
    access = doors.cluster.client_access
    address = await doors.open(access.authority.ca_pem)
    own = Cluster.new()
    honest = own.issue("studio")
    ended = []

    for role in (Role.CLIENT, Role.MEMBER):
        issuer = role.authority_name(access.fingerprint)
        chain = honest.cert_pem + authority_signed_by_a_client(access, own, issuer)
        posing = Identity("studio", honest.key_pem, chain, doors.cluster.ca_pem)
        async with connect(address, posing) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary("/unicluster.v1.Node/Drain")(b"", timeout=10)
            ended.append(caught.value.code())

    # As a client it gets in and may not; as a member its signature is wrong.
    assert ended == [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE]
    assert doors.called == []


async def test_members_introduce_the_next_authority_of_members(doors: Doors) -> None:
    """The chain that clients can't make: without it the test above would prove nothing."""
    address = await doors.open("")
    own = Cluster.new()
    honest = own.issue("studio")
    chain = honest.cert_pem + own.introduction(doors.cluster)
    identity = Identity("studio", honest.key_pem, chain, doors.cluster.ca_pem)

    async with connect(address, identity) as channel:
        await channel.unary_unary("/unicluster.v1.Node/Drain")(b"", timeout=10)

    assert doors.called == ["/unicluster.v1.Node/Drain"]


async def test_a_client_can_not_pose_as_a_server(doors: Doors) -> None:
    access = doors.cluster.client_access
    server = make_server()
    server.add_generic_rpc_handlers([_Everything(doors.called)])
    posing = forged(access, Role.CLIENT.authority_name(access.fingerprint))
    port = bind(server, HOST, 0, posing, admitted=lambda: access.authority.ca_pem)
    await server.start()
    try:
        async with connect(f"{HOST}:{port}", doors.cluster.issue("studio")) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary("/unicluster.v1.Chat/Describe")(b"", timeout=scaled(10))
    finally:
        await server.stop(grace=None)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert doors.called == []


# Client tokens


def test_a_client_token_holds_the_access() -> None:
    cluster = Cluster.new()
    access = ClientAccess.from_token(f" {cluster.client_access.token.upper()}\n")

    assert access == cluster.client_access
    assert access.fingerprint == cluster.fingerprint
    assert access.token.startswith("ucc1-")


def test_neither_token_gives_the_other() -> None:
    cluster = Cluster.new()
    access = cluster.client_access

    with pytest.raises(TrustError, match="client token, which joins no cluster"):
        Cluster.from_token(access.token)
    with pytest.raises(TrustError, match="no client token"):
        ClientAccess.from_token(cluster.token)
    assert cluster.secret.hex() not in (access.secret + access.member_key).hex()
    assert Cluster(access.secret).fingerprint != cluster.fingerprint


def test_a_mistyped_client_token_is_refused_and_not_repeated() -> None:
    token = Cluster.new().client_access.token
    for position in range(5, len(token)):
        wrong = "a" if token[position] != "a" else "b"
        mistyped = token[:position] + wrong + token[position + 1 :]

        with pytest.raises(TrustError, match="mistyped") as caught:
            ClientAccess.from_token(mistyped)

        assert mistyped[5:] not in str(caught.value)


def test_nothing_printed_shows_a_clients_secret() -> None:
    access = Cluster.new().client_access
    printed = f"{access!r} {access} {access.authority!r} {access.issue('laptop')!r}"

    assert access.secret.hex() not in printed
    assert repr(access.secret) not in printed
    assert "PRIVATE KEY" not in printed


def test_a_login_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    cluster = Cluster.new()

    Store(tmp_path).login(cluster.client_access.token)

    assert Store(tmp_path).require_access() == cluster.client_access
    assert Store(tmp_path).load() is None
    assert Store(tmp_path).client_path.stat().st_mode & 0o777 == 0o600


def test_a_member_has_access_without_a_login(tmp_path: Path) -> None:
    cluster = Store(tmp_path).create()

    assert Store(tmp_path).require_access() == cluster.client_access
    with pytest.raises(TrustError, match="is a member of cluster"):
        Store(tmp_path).login(Cluster.new().client_access.token)


def test_without_either_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="`unicluster join`, or `unicluster login`"):
        Store(tmp_path).require_access()


def test_the_client_runs_where_only_a_client_token_is(tmp_path: Path) -> None:
    """The member's secret is not on the machine at all."""
    cluster = Cluster.new()
    Store(tmp_path).login(cluster.client_access.token)
    program = (
        "from unicluster import Client\n"
        "try: Client('127.0.0.1:9').describe()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )

    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        env={"UNICLUSTER_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )

    assert "UnavailableError 127.0.0.1:9 refuses connections" in ran.stdout, ran.stderr
