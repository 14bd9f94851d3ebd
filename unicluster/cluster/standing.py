"""Calls and connections that outlast the generation of the secret that let them in.

TLS looks at a certificate once, when a connection is made. So each server also looks at each call,
and at the calls that go on: once the authority that issued the caller's certificate is trusted no
longer, calls are refused, and members' streams are ended. Who has shown a certificate of a newer
generation for the same key may go on: a process renews its certificate for one key, and nobody
else can. `kept_known` shows it, on a connection of its own; so a rotation cuts no ring.
"""

import asyncio
import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from unicluster.cluster.background import going_on
from unicluster.cluster.handlers import Context, Handler, Interceptor, guarded
from unicluster.cluster.roles import role_of
from unicluster.trust.identity import Credentials
from unicluster.trust.keyring import LOOK_SECONDS
from unicluster.trust.role import Role, audit

log = logging.getLogger(__name__)

# Keys that are remembered, each with the authorities that certified it.
MOST_KEYS = 4096
REASON = "the cluster's token was rotated: connect anew, with a certificate of the new one"

Names = frozenset[str]


@functools.lru_cache(256)
def authorities(pem: str) -> Names:
    """Names of the authorities whose certificates these are."""
    return frozenset(
        each.subject.rfc4514_string() for each in x509.load_pem_x509_certificates(pem.encode())
    )


@functools.lru_cache(1024)
def _issuer_and_key(pem: bytes) -> tuple[str, bytes]:
    certificate = x509.load_pem_x509_certificate(pem)
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return certificate.issuer.rfc4514_string(), key


class GenerationCheck(Interceptor):
    """Refuses and ends calls of those whose generation of the cluster has ended.

    For one event loop. Knows nothing, and so refuses nobody, before `trust`.
    """

    def __init__(self) -> None:
        self._trusted: Callable[[], Names] = frozenset
        self._seen: Names = frozenset()  # authorities that were trusted since the server started
        self._shown: OrderedDict[bytes, Names] = OrderedDict()  # issuers not ended, by key
        self._open: dict[asyncio.Task[Any], bytes] = {}  # members' calls, by task: certificates
        self._ended: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    def trust(self, trusted: Callable[[], Names]) -> None:
        """`trusted()` are the names of the authorities that are trusted now."""
        self._trusted = trusted
        self._seen |= trusted()

    def wrapped(self, handler: Handler, method: str) -> Handler:
        return guarded(handler, self._guard)

    @contextlib.asynccontextmanager
    async def _guard(self, context: Context) -> AsyncIterator[None]:
        shown = next(iter(context.auth_context().get("x509_pem_cert", [])), b"")
        if shown and not self._admits(shown):
            audit.warning("refused %s: its token was rotated away", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, REASON)
        task = asyncio.current_task()
        if task is None or not shown or role_of(context) is not Role.MEMBER:
            yield  # an answer that a client already gets is no new access
            return
        self._open[task] = shown
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            audit.warning("ended a call of %s: its token was rotated away", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, REASON)
        finally:
            del self._open[task]
            self._ended.discard(task)

    def _admits(self, pem: bytes) -> bool:
        trusted = self._trusted()
        self._seen |= trusted
        issuer, key = _issuer_and_key(pem)
        good = (self._shown.pop(key, frozenset()) | {issuer}) - (self._seen - trusted)
        if good:
            self._shown[key] = good
            if len(self._shown) > MOST_KEYS:
                self._shown.popitem(last=False)
        return bool(good)

    async def _watch(self) -> None:
        """Ends members' calls while there are any."""
        while self._open:
            await asyncio.sleep(LOOK_SECONDS)
            with going_on("ending connections of a rotated token"):
                for task, pem in list(self._open.items()):
                    if task not in self._ended and not self._admits(pem):
                        self._ended.add(task)
                        task.cancel()


@contextlib.asynccontextmanager
async def kept_known(
    identity: Credentials, show: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """While the block runs: `show` calls a peer anew whenever other authorities are trusted.

    For those who have a connection to the peer that lasts. `show` makes a channel for it, so that
    the peer sees the present certificate.
    """
    task = asyncio.create_task(_keep_known(identity, show))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _keep_known(identity: Credentials, show: Callable[[], Awaitable[object]]) -> None:
    known = identity.current.ca_pem
    while True:
        await asyncio.sleep(LOOK_SECONDS / 2)
        if (now := identity.current.ca_pem) == known:
            continue
        try:
            await show()
            known = now
        except (grpc.RpcError, TimeoutError) as error:  # tried again: it may be busy, or behind
            log.info("showing a new certificate: %s", error)
