"""Metrics for Prometheus over HTTPS, for those who show a certificate.

prometheus_client makes the page. Its own server is not used: it shakes hands with one client at a
time, so that a silent one would keep all others out.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily

from coordinator.serving.exposition import DeploymentCollector
from unicluster.client.metrics import Metrics, metrics_from_wire
from unicluster.cluster.channels import check_free
from unicluster.trust.identity import Identity, default_name
from unicluster.trust.keyring import Keyring, Membership
from unicluster.trust.role import audit
from unicluster.v1.chat_pb2 import Measured

log = logging.getLogger(__name__)

PATH = "/metrics"
# For a client to shake hands, to ask, and to take the answer: each.
CLIENT_SECONDS = 10.0
READ_SECONDS = 10.0
# At a time, all together and from one address: each takes a thread.
MOST_CLIENTS = 256
MOST_OF_ONE = 16
# Who is refused is logged once in so many seconds for each address, of so many addresses.
LOG_AGAIN_SECONDS = 60.0
MOST_LOGGED = 1024

App = Callable[..., Iterable[bytes]]


@contextlib.asynccontextmanager
async def metrics_port(
    membership: Membership,
    host: str,
    port: int,
    measure: Callable[[], Coroutine[Any, Any, Measured]],
) -> AsyncIterator[int]:
    """Serves what `measure` gives while the block runs; yields the port (`port` may be 0).

    Admitted are members of the cluster, and certificates that are for this alone (see
    Cluster.scrapers). Raises InputError when the port can't be had.
    """
    check_free(host, port, "--metrics-port")
    loop = asyncio.get_running_loop()

    def read() -> Metrics:
        measured = asyncio.run_coroutine_threadsafe(measure(), loop)
        return metrics_from_wire(measured.result(READ_SECONDS))

    registry = CollectorRegistry()
    registry.register(DeploymentCollector(read))
    keyring = Keyring.of_member(membership, default_name())
    left = Gauge(
        "unicluster_certificate_seconds_left",
        "Until this port's certificate expires; it renews itself at half of its life.",
        registry=registry,
    )
    left.set_function(lambda: keyring.current.expires_s - time.time())
    registry.register(_Authorities(membership))
    tls = _RenewedTls(keyring, membership.scrapers_ca_pem)
    server = _Server(host, port, _at_path(make_wsgi_app(registry)), tls)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


class _Authorities:
    """A collector of how long the members' authorities are good for: two in a rotation."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "unicluster_authority_seconds_left",
            "Until an authority that members are trusted by expires; two during a rotation.",
            labels=["cluster"],
        )
        for cluster in self._membership.generations:
            family.add_metric([cluster.fingerprint], cluster.authority_seconds_left)
        yield family


class _RenewedTls:
    """The server's side of TLS, with the certificate that is current in each handshake."""

    def __init__(self, keyring: Keyring, admitted: Callable[[], str]) -> None:
        self._keyring = keyring
        self._admitted = admitted
        self._lock = threading.Lock()
        self._shown = keyring.current
        self._context = _server_side(self._shown, admitted())

    @property
    def context(self) -> ssl.SSLContext:
        with self._lock:
            if (now := self._keyring.current) is not self._shown:
                self._context = _server_side(now, self._admitted())
                self._shown = now
            return self._context


def _server_side(identity: Identity, admitted: str) -> ssl.SSLContext:
    """TLS that demands a certificate of the cluster or of the authority `admitted`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.ca_pem + admitted)
    identity.load_into(context)
    return context


def _at_path(app: Any) -> App:
    """The app at its path, and nothing anywhere else."""

    def routed(environ: dict[str, Any], respond: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            page: Iterable[bytes] = app(environ, respond)
            return page
        respond("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"Metrics are at {PATH}\n".encode()]

    return routed


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        log.debug("%s: %s", self.client_address[0], format % args)


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a thread for each client, handshake included, and a limit on clients."""

    daemon_threads = True

    def __init__(self, host: str, port: int, app: App, tls: _RenewedTls) -> None:
        self._tls = tls
        self._clients: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._logged: dict[str, float] = {}
        self._everywhere = not host and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if self._everywhere else _family(host)
        super().__init__((host, port), _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Binds without looking up the machine's name, which may take long."""
        if self._everywhere:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the client gets a thread; else its connection is closed at once."""
        host = client_address[0]
        with self._counting:
            if self._clients.total() >= MOST_CLIENTS or self._clients[host] >= MOST_OF_ONE:
                return False
            self._clients[host] += 1
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._clients[client_address[0]] -= 1

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(CLIENT_SECONDS)
        with self._tls.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        now, host = time.monotonic(), client_address[0]
        with self._counting:
            recent = {h: t for h, t in self._logged.items() if now - t < LOG_AGAIN_SECONDS}
            self._logged = recent
            if host in recent or len(recent) >= MOST_LOGGED:
                return
            recent[host] = now
        audit.warning("metrics refused to %s", host, exc_info=log.isEnabledFor(logging.DEBUG))


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM)[0][0]
