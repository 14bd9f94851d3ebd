"""Every gRPC channel and server of the project is made here, so that none lacks an option."""

import asyncio
import contextlib
import errno
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import grpc
import grpc.aio

from unicluster.cluster.handlers import CallLimit
from unicluster.cluster.roles import RoleCheck
from unicluster.cluster.sizes import CONTROL_BYTES, SizeCheck
from unicluster.cluster.standing import GenerationCheck, authorities, kept_known
from unicluster.errors import (
    AnswerError,
    BusyError,
    DoesNotFitError,
    InputError,
    NotFoundError,
    StageError,
    StoppingError,
    TrustError,
    UnavailableError,
    UniclusterError,
)
from unicluster.trust.identity import SERVER_NAME, Credentials, server_name_of

# Calls that a server answers at once, streams included: more are refused.
MOST_CALLS = 2048
# Of one peer: all clients of a gateway are one peer of its head.
MOST_CALLS_OF_PEER = 1024


def _is_news(record: logging.LogRecord) -> bool:
    cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not (cancelled or str(record.msg).startswith("Aborting method"))


# gRPC logs each call that its client cancels as an error, with a traceback, and warns of each that
# was open when a server was stopped.
logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)

HANDSHAKE_SECONDS = 5.0
# To show a peer a new certificate.
SHOW_SECONDS = 5.0

# A peer that is gone without a word is noticed within the sum of the two.
KEEPALIVE_TIME = 1.0
KEEPALIVE_TIMEOUT = 2.5

_Options = list[tuple[str, Any]]

_COMMON: _Options = [
    ("grpc.max_send_message_length", -1),  # whoever receives has a limit
    ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT * 1000)),
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT * 1000)),  # else a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
]

SERVER_OPTIONS: _Options = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # else two servers share a port in silence
    # Else a stranger who says nothing holds a connection for two minutes.
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
    # Without these two a server hangs up on clients whose pings it finds too many.
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_TIME * 500)),
    ("grpc.http2.max_ping_strikes", 0),
]

CHANNEL_OPTIONS: _Options = [
    *_COMMON,
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.enable_http_proxy", 0),  # the machines of a cluster are never behind a proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new channel doesn't inherit an old one's backoff
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
]


_generations: "WeakKeyDictionary[grpc.aio.Server, GenerationCheck]" = WeakKeyDictionary()


def make_server(
    interceptors: "Sequence[grpc.aio.ServerInterceptor[Any, Any]]" = (),
    *,
    most_bytes: int = CONTROL_BYTES,
) -> grpc.aio.Server:
    """A server without ports or services yet, which checks its callers' roles.

    most_bytes: of the largest request to any of its services; see `sizes`.
    Call it within a running event loop.
    """
    generations = GenerationCheck()
    server = grpc.aio.server(
        interceptors=[
            *(RoleCheck(), generations, CallLimit(MOST_CALLS_OF_PEER), SizeCheck()),
            *interceptors,
        ],
        options=[*SERVER_OPTIONS, _receives(most_bytes)],
        maximum_concurrent_rpcs=MOST_CALLS,
    )
    _generations[server] = generations
    return server


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    identity: Credentials,
    *,
    admitted: Callable[[], str] = str,
    flag: str = "--port",
) -> int:
    """Listen at `host` ("" for all addresses) and `port` (0: any free one); returns the port.

    Members are admitted, and holders of certificates of the authorities `admitted()`. Each
    handshake shows the certificate that is current then.
    Raises InputError when that can't be; it tells to choose another port with `flag`.
    """
    check_free(host, port, flag)
    try:
        taken = server.add_secure_port(
            join_address(host or "::", port), _server_credentials(identity, admitted)
        )
    except RuntimeError:
        raise _taken(host, port, flag) from None
    if (generations := _generations.get(server)) is not None:
        generations.trust(lambda: authorities(identity.current.ca_pem + admitted()))
    return taken


# gRPC keeps only a bare pointer to what it asks in each handshake: these last for ever.
_asked_by_grpc: list[grpc.ServerCredentials] = []


def _server_credentials(
    identity: Credentials, admitted: Callable[[], str]
) -> grpc.ServerCredentials:
    shown = identity.current

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """For the next handshake, if it is another than for the last. On threads of gRPC's."""
        nonlocal shown
        if (now := identity.current) is shown:
            return None
        shown = now
        return now.server_configuration(admitted())

    made = grpc.dynamic_ssl_server_credentials(
        shown.server_configuration(admitted()),
        renewed,  # type: ignore[arg-type]  # the stubs forget that None is "unchanged"
        require_client_authentication=True,
    )
    _asked_by_grpc.append(made)
    return made


def connect(
    address: str, identity: Credentials, *, most_bytes: int = CONTROL_BYTES, machine: str = ""
) -> grpc.aio.Channel:
    """A channel to `address` ("host:port"), which connects when it is first used.

    most_bytes: of the largest response. machine: the id of the only one that is let answer.
    """
    return grpc.aio.secure_channel(
        join_address(*split_address(address)),
        identity.current.channel_credentials(),
        options=[*_only(machine), _receives(most_bytes)],
    )


@contextlib.asynccontextmanager
async def lasting(
    address: str,
    identity: Credentials,
    show: Callable[[grpc.aio.Channel], Awaitable[object]],
    *,
    most_bytes: int = CONTROL_BYTES,
    machine: str = "",
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel as `connect` makes it, for calls that may outlast a rotation of the token."""
    async with (
        known_at(address, identity, show),
        connect(address, identity, most_bytes=most_bytes, machine=machine) as channel,
    ):
        yield channel


@contextlib.asynccontextmanager
async def known_at(
    address: str, identity: Credentials, show: Callable[[grpc.aio.Channel], Awaitable[object]]
) -> AsyncIterator[None]:
    """For who has a channel to `address` whose calls may outlast a rotation of the token.

    `show` makes some call; it gets a new channel whenever other authorities are trusted, so that
    the peer, which looks at each call's certificate, knows that this one's holder has moved on.
    """

    async def shown() -> None:
        async with connect(address, identity) as fresh:
            await asyncio.wait_for(show(fresh), SHOW_SECONDS)

    async with kept_known(identity, shown):
        yield


def connect_sync(address: str, identity: Credentials) -> grpc.Channel:
    """A channel as `connect` makes it, for callers without an event loop."""
    return grpc.secure_channel(
        join_address(*split_address(address)),
        identity.current.channel_credentials(),
        options=[*CHANNEL_OPTIONS, _receives(CONTROL_BYTES)],
    )


def _only(machine: str) -> _Options:
    """Options with which a channel accepts one machine only; any of the cluster without an id."""
    options = dict(CHANNEL_OPTIONS)
    return list((options | {"grpc.ssl_target_name_override": server_name_of(machine)}).items())


def _receives(most_bytes: int) -> tuple[str, int]:
    return ("grpc.max_receive_message_length", most_bytes)


def join_address(host: str, port: int) -> str:
    """ "host:port", with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The inverse: ("::1", 7000) from "[::1]:7000". Raises InputError for anything else."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{address!r} is no address: give it as HOST:PORT")
    return host, int(port)


def without_scope(address: str) -> str:
    """An address as other machines may dial it, who have other names for their links."""
    host, port = split_address(address)
    return join_address(host.partition("%")[0], port)


def peer_name(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """Who calls, for messages and the log: "studio (192.168.1.7:50412)"."""
    names = list(context.auth_context().get("x509_common_name", []))
    name = names[0].decode() if names else "unknown"
    return f"{name} ({plain_address(context.peer())})"


def channel_was_closed() -> bool:
    """Whether a CancelledError just caught from a call means that its channel was closed.

    Else it is for the task that waits for the call, which must let it pass.
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling()


def host_of(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """The address that a caller calls from, without its port."""
    return split_address(plain_address(context.peer()))[0]


def plain_address(target: str) -> str:
    """ "127.0.0.1:80" from gRPC's "ipv4:127.0.0.1:80", "[::1]:80" from "ipv6:%5B::1%5D:80"."""
    return re.sub(r"^ipv[46]:(//)?", "", unquote(target))


_CODES: list[tuple[type[UniclusterError], grpc.StatusCode]] = [
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (DoesNotFitError, grpc.StatusCode.FAILED_PRECONDITION),
    (TrustError, grpc.StatusCode.PERMISSION_DENIED),
    (TrustError, grpc.StatusCode.UNAUTHENTICATED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AnswerError, grpc.StatusCode.ABORTED),
    (StageError, grpc.StatusCode.INTERNAL),
    (UniclusterError, grpc.StatusCode.UNKNOWN),
]

# Sent with the errors that our own servers raise: their messages are passed on as they are.
OUR_OWN = (("unicluster-error", "1"),)
# Besides, with a StoppingError.
STOPPING = (("unicluster-stopping", "1"),)

# What gRPC makes of a message that could not be written, if it notices before the connection's end.
_WRITE_FAILED = "Internal error from Core"

# What gRPC says of a message that is larger than its receiver accepts.
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\.? (\d+)\)")

# What gRPC itself says of a broken connection, and how a person would say it.
_BROKEN = [
    (
        "failed to connect.*(Socket closed|reset by peer)",
        "hangs up: it is stopping, or does not accept this machine's certificate",
    ),
    ("Connection refused", "refuses connections: is it still running?"),
    ("CERTIFICATE_VERIFY_FAILED", "has no certificate of this cluster"),
    ("(Ssl|Tls) handshake failed", "does not speak TLS as this cluster does"),
    ("[Kk]eepalive", "stopped answering"),
    ("ping timeout", "stopped answering"),
    ("Cancelling all calls", "is stopping"),  # what a server says of its own end
    ("reset by peer", "closed the connection"),
    ("Broken pipe", "closed the connection"),
    ("Socket closed", "closed the connection"),
    ("GOAWAY", "closed the connection"),
    ("recvmsg", "closed the connection"),
    ("Handshake read failed", "does not answer"),
    ("DNS resolution failed", "has a name that can't be resolved"),
    ("No route to host", "is unreachable: no route to host"),
    ("Network is unreachable", "is unreachable: no network"),
    ("failed to connect to all addresses", "can't be reached"),
]


def status_of(error: UniclusterError) -> grpc.StatusCode:
    """The status a server answers with; `as_error` is the inverse."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def is_our_own(error: grpc.RpcError) -> bool:
    """Whether a server of ours has ended the call with one of our errors, and not gRPC."""
    return OUR_OWN[0][0] in _marks(error)


def _marks(error: grpc.RpcError) -> set[str]:
    metadata: Any = error.trailing_metadata() or ()
    return {key for key, _ in metadata}


def as_error(error: grpc.RpcError, who: str) -> UniclusterError:
    """One of our errors for a failed call to `who`. `error` comes from any kind of channel."""
    code: grpc.StatusCode = error.code()
    details = " ".join((error.details() or "").split())
    is_ours = is_our_own(error)
    if is_ours and STOPPING[0][0] in _marks(error):
        return StoppingError(details)
    for pattern, meaning in () if is_ours else _BROKEN:
        if code is grpc.StatusCode.UNAVAILABLE and re.search(pattern, details):
            message = f"{who} {meaning}"
            return TrustError(message) if "CERTIFICATE" in pattern else UnavailableError(message)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (large := _TOO_LARGE.search(details)):
        size, most = large.groups()
        return InputError(f"{who} accepts no message of {size} bytes, but of {most} at most")
    if code is grpc.StatusCode.INTERNAL and details == _WRITE_FAILED and not is_ours:
        return UnavailableError(f"{who} closed the connection")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"{who} did not answer in time")
    if code is grpc.StatusCode.CANCELLED:
        return UnavailableError(f"the call to {who} was cancelled")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UnavailableError(f"{who} does not offer this: does it run the same version?")
    for kind, its_code in _CODES:
        if code is its_code:
            return kind(details or f"{who} failed without saying why")
    return UniclusterError(f"{who}: {details or code.name}")


def check_free(host: str, port: int, flag: str = "--port") -> None:
    """Try the address with a plain socket, which, unlike gRPC, says why it can't be had."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except socket.gaierror:
        raise InputError(f"{host} is no address: choose another with --host") from None
    except PermissionError:
        raise InputError(f"port {port} needs more rights: choose another with {flag}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(host, port, flag) from None
        raise InputError(
            f"can't listen on {host}: {error.strerror}: choose another with --host"
        ) from None


def _taken(host: str, port: int, flag: str) -> InputError:
    return InputError(
        f"port {port} on {host or 'this machine'} is taken: choose another with {flag}"
    )
