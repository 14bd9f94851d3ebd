"""Which server a client talks to, who the client is, and the channels between them."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Generic, TypeVar

import grpc.aio

from unicluster.cluster.channels import connect, is_our_own
from unicluster.cluster.versions import mismatch
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import ClientAccess, Cluster
from unicluster.trust.identity import Credentials, Identity, default_name
from unicluster.trust.keyring import Keyring
from unicluster.trust.store import Store
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatStub

log = logging.getLogger(__name__)

C = TypeVar("C")

# A gateway on this machine answers in milliseconds, unless the machine is very busy.
HERE_SECONDS = 1.0


class Channels(Generic[C]):
    """One channel at a time, made anew for another address, or for a certificate that was renewed.

    An older one is kept until the calls that run over it have ended.
    """

    def __init__(self, make: Callable[[str, Credentials], C]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._shown: tuple[str, Identity] | None = None
        self._newest: C | None = None
        self._calls: dict[C, int] = {}

    def use(self, address: str, keyring: Keyring) -> C:
        """The channel for a call, whose end `leave` is to be told."""
        with self._lock:
            now = address, keyring.current
            if self._newest is None or now != self._shown:
                self._newest, self._shown = self._make(*now), now
                self._calls[self._newest] = 0
            self._calls[self._newest] += 1
            return self._newest

    def leave(self, channel: C) -> list[C]:
        """A call has ended; returns the channels that are of no more use."""
        with self._lock:
            self._calls[channel] -= 1
            unused = [c for c, calls in self._calls.items() if not calls and c is not self._newest]
            for each in unused:
                del self._calls[each]
            return unused

    def all(self) -> list[C]:
        with self._lock:
            return list(self._calls)


class Target:
    """The server to talk to, and who we are."""

    def __init__(
        self, server: str | None, cluster: Cluster | ClientAccess | None, timeout: float
    ) -> None:
        self.timeout = timeout
        self.address = server or os.environ.get("UNICLUSTER_SERVER", "")
        self._named = bool(self.address)
        self._cluster = cluster

    @cached_property
    def keyring(self) -> Keyring:
        if self._cluster is None:  # follows a rotation, or another `login`
            return Keyring.of_access(Store(), default_name())
        return Keyring.of_client(self._access, default_name())

    def forget(self) -> None:
        """Looks for a server anew, where none was named: it may have moved."""
        if not self._named:
            self.address = ""

    async def find(self) -> str:
        """The server's address: `server`, else that of the first gateway found by mDNS."""
        # What was found is returned: another answer of this client may `forget` it meanwhile.
        address = self.address or await self.find_here()
        if not address:
            # Here, because zeroconf is slow to import and an address makes it needless.
            from unicluster.cluster.discovery import Browser
            from unicluster.cluster.records import Kind
            from unicluster.dialing.dialer import Dialer

            async with Browser(Kind.CHAT, self._access.fingerprint) as browser:
                if not await browser.wait_for(bool, self.timeout):
                    raise UnavailableError(
                        f"no machine of this cluster was found serving within {self.timeout:g} s: "
                        "run `unicluster serve`, or name the server as HOST:PORT"
                    )
                server = next(iter(browser.found.values()))
                versions = server.version, server.protocol, server.oldest
                if wrong := mismatch(f"the server at {server.address}", *versions):
                    raise UnavailableError(wrong)
                dialer = Dialer(self.keyring)
                reached = await dialer.reach(server.addresses, f"the server {server.name}")
                address = reached.address
        self.address = address
        return address

    async def find_here(self) -> str:
        """The server's address if it is known, else that of a gateway here; "" if none answers."""
        if address := self.address:
            return address
        from unicluster.cluster import here
        from unicluster.cluster.records import Kind

        for service in here.services(Kind.CHAT):
            async with connect(service.address, self.keyring.current) as channel:
                try:
                    await ChatStub(channel).Describe(
                        wire.DescribeChatRequest(), timeout=min(HERE_SECONDS, self.timeout)
                    )
                except grpc.aio.AioRpcError as error:
                    if not is_our_own(error):  # else it is there, and inspects its model
                        log.info("nothing is served at %s: %s", service.address, error.details())
                        continue
            versions = service.version, service.protocol, service.oldest
            if wrong := mismatch(f"the server at {service.address}", *versions):
                raise UnavailableError(wrong)
            return service.address
        return ""

    def find_sync(self) -> str:
        if address := self.address:
            return address
        # In a thread, because the caller's may run an event loop: a notebook's does.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self.find()).result()

    @cached_property
    def _access(self) -> ClientAccess:
        if self._cluster is None:
            return Store().require_access()
        # A member too shows a client's certificate here: it needs no more.
        return self._cluster.client_access if isinstance(self._cluster, Cluster) else self._cluster
