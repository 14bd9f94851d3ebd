"""The client library: ask the cluster and get an answer, at once or as it comes.

with Client() as client:
    print(client.chat("How many legs has a spider?").text)
    for event in client.stream("Tell me a story.", temperature=0.7):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio

from unicluster.client.answers import (
    Answer,
    ChatInfo,
    Event,
    Finish,
    Options,
    Status,
    collect,
    deadline_of,
    event_from_wire,
    info_from_wire,
    request_to_wire,
)
from unicluster.client.metrics import Metrics, metrics_from_wire
from unicluster.client.prompts import Messages
from unicluster.cluster.channels import as_error, connect, connect_sync
from unicluster.cluster.versions import mismatch
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import ClientAccess, Cluster
from unicluster.trust.identity import Credentials, Identity, default_name
from unicluster.trust.keyring import Keyring
from unicluster.trust.store import Store
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatStub

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub


OnStatus = Callable[[Status], None] | None


class Client:
    """A client for programs without an event loop. Threads may share it.

    `server` is "HOST:PORT"; None: $UNICLUSTER_SERVER, else whichever machine of the cluster
    serves, found by mDNS within `timeout` seconds. `cluster` defaults to the one this machine
    is in. Connects when first used.

    All methods raise InputError for what can't be asked (before or after asking the server),
    TrustError where this machine is in no cluster or the server is not of it, NotFoundError for
    another model than the one served, BusyError where the queue is full, and UnavailableError
    where nothing serves, the answer broke off, or the deadline passed.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        cluster: Cluster | ClientAccess | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._target = _Target(server, cluster, timeout)
        self._channels: _Channels[grpc.Channel] = _Channels(connect_sync)

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The whole answer to a prompt or a conversation."""
        return collect(self.stream(messages, **options))

    def stream(
        self, messages: Messages, **options: Unpack[Options]
    ) -> Generator[Event, None, None]:
        """The answer as it comes: Delta after Delta, and a Finish at the end.

        Closing the generator before that stops the answer, and so does dropping it.
        """
        request = request_to_wire(messages, options)
        return self._events(request, deadline_of(options), options.get("on_status"))

    def describe(self) -> ChatInfo:
        """The deployment and its state."""
        try:
            with self._stub() as stub:
                info = stub.Describe(wire.DescribeChatRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return info_from_wire(info)

    def count_tokens(self, messages: Messages, **options: Unpack[Options]) -> int:
        """Tokens of a prompt or a conversation, as the model's chat template writes it."""
        request = request_to_wire(messages, options)
        try:
            with self._stub() as stub:
                count = stub.CountTokens(request, timeout=_count_seconds(options, self._target))
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return count.prompt_tokens

    def measure(self) -> Metrics:
        """Metrics of the deployment. `Metrics.since` computes rates from two readings."""
        try:
            with self._stub() as stub:
                measured = stub.Measure(wire.MeasureRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return metrics_from_wire(measured)

    def close(self) -> None:
        """Answers that still run are stopped."""
        for channel in self._channels.all():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _stub(self) -> Generator[ChatStub, None, None]:
        channel = self._channels.use(self._target.find_sync(), self._target.keyring)
        try:
            yield ChatStub(channel)
        finally:
            for unused in self._channels.leave(channel):
                unused.close()

    def _events(
        self, request: wire.GenerateRequest, deadline: float | None, on_status: OnStatus
    ) -> Generator[Event, None, None]:
        event: Event | None = None
        with self._stub() as stub:
            call = stub.Generate(request, timeout=deadline)
            try:
                for message in call:
                    if message.HasField("status"):
                        _report(message.status, on_status)
                        continue
                    event = event_from_wire(message)
                    yield event
            except grpc.RpcError as error:
                raise as_error(error, self._target.address) from error
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
        _check_finished(event, self._target.address)


class AsyncClient:
    """A client for programs with an event loop, with the methods and errors of Client."""

    def __init__(
        self,
        server: str | None = None,
        *,
        cluster: Cluster | ClientAccess | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._target = _Target(server, cluster, timeout)
        self._channels: _Channels[grpc.aio.Channel] = _Channels(connect)

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The whole answer to a prompt or a conversation."""
        return collect([event async for event in self.stream(messages, **options)])

    def stream(self, messages: Messages, **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """The answer as it comes: Delta after Delta, and a Finish at the end.

        Closing the generator before that stops the answer, and so does dropping it.
        """
        request = request_to_wire(messages, options)
        return self._events(request, deadline_of(options), options.get("on_status"))

    async def find(self) -> str:
        """The address of the server, which is looked for if it was not named."""
        return await self._target.find()

    async def find_here(self) -> str:
        """The address of a server on this machine; "" if none answers."""
        return await self._target.find_here()

    async def describe(self) -> ChatInfo:
        """The deployment and its state."""
        try:
            async with self._stub() as stub:
                asked = wire.DescribeChatRequest()
                info = await stub.Describe(asked, timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return info_from_wire(info)

    async def count_tokens(self, messages: Messages, **options: Unpack[Options]) -> int:
        """Tokens of a prompt or a conversation, as the model's chat template writes it."""
        request = request_to_wire(messages, options)
        try:
            async with self._stub() as stub:
                seconds = _count_seconds(options, self._target)
                count = await stub.CountTokens(request, timeout=seconds)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return count.prompt_tokens

    async def measure(self) -> Metrics:
        """Metrics of the deployment. `Metrics.since` computes rates from two readings."""
        try:
            async with self._stub() as stub:
                asked = wire.MeasureRequest()
                measured = await stub.Measure(asked, timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return metrics_from_wire(measured)

    async def close(self) -> None:
        """Answers that still run are stopped."""
        for channel in self._channels.all():
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def _stub(self) -> AsyncGenerator["ChatAsyncStub", None]:
        channel = self._channels.use(await self._target.find(), self._target.keyring)
        try:
            yield ChatStub(channel)
        finally:
            for unused in self._channels.leave(channel):
                await unused.close(None)

    async def _events(
        self, request: wire.GenerateRequest, deadline: float | None, on_status: OnStatus
    ) -> AsyncGenerator[Event, None]:
        event: Event | None = None
        async with self._stub() as stub:
            call = stub.Generate(request, timeout=deadline)
            try:
                async for message in call:
                    if message.HasField("status"):
                        _report(message.status, on_status)
                        continue
                    event = event_from_wire(message)
                    yield event
            except grpc.RpcError as error:
                raise as_error(error, self._target.address) from error
            finally:
                call.cancel()
        _check_finished(event, self._target.address)


log = logging.getLogger(__name__)

C = TypeVar("C")

# A gateway on this machine answers in milliseconds, unless the machine is very busy.
HERE_SECONDS = 1.0


class _Channels(Generic[C]):
    """One channel at a time, made anew when the certificate that it shows was renewed.

    An older one is kept until the calls that run over it have ended.
    """

    def __init__(self, make: Callable[[str, Credentials], C]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._shown: Identity | None = None
        self._newest: C | None = None
        self._calls: dict[C, int] = {}

    def use(self, address: str, keyring: Keyring) -> C:
        """The channel for a call, whose end `leave` is to be told."""
        with self._lock:
            now = keyring.current
            if self._newest is None or now is not self._shown:
                self._newest, self._shown = self._make(address, now), now
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


class _Target:
    """The server to talk to, and who we are."""

    def __init__(
        self, server: str | None, cluster: Cluster | ClientAccess | None, timeout: float
    ) -> None:
        self.timeout = timeout
        self.address = server or os.environ.get("UNICLUSTER_SERVER", "")
        self._cluster = cluster

    @cached_property
    def keyring(self) -> Keyring:
        if self._cluster is None:  # follows a rotation, or another `login`
            return Keyring.of_access(Store(), default_name())
        return Keyring.of_client(self._access, default_name())

    async def find(self) -> str:
        """The server's address: `server`, else that of the first gateway found by mDNS."""
        if not self.address:
            self.address = await self.find_here()
        if not self.address:
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
                self.address = reached.address
        return self.address

    async def find_here(self) -> str:
        """The server's address if it is known, else that of a gateway here; "" if none answers."""
        if self.address:
            return self.address
        from unicluster.cluster import here
        from unicluster.cluster.records import Kind

        for service in here.services(Kind.CHAT):
            async with connect(service.address, self.keyring.current) as channel:
                try:
                    await ChatStub(channel).Describe(
                        wire.DescribeChatRequest(), timeout=min(HERE_SECONDS, self.timeout)
                    )
                except grpc.aio.AioRpcError as error:
                    log.info("nothing is served at %s: %s", service.address, error.details())
                    continue
            versions = service.version, service.protocol, service.oldest
            if wrong := mismatch(f"the server at {service.address}", *versions):
                raise UnavailableError(wrong)
            return service.address
        return ""

    def find_sync(self) -> str:
        if not self.address:
            # In a thread, because the caller's may run an event loop: a notebook's does.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, self.find()).result()
        return self.address

    @cached_property
    def _access(self) -> ClientAccess:
        if self._cluster is None:
            return Store().require_access()
        # A member too shows a client's certificate here: it needs no more.
        return self._cluster.client_access if isinstance(self._cluster, Cluster) else self._cluster


def _report(status: wire.Status, on_status: OnStatus) -> None:
    if on_status is not None:
        on_status(Status(status.state, status.detail))


def _check_finished(last: Event | None, server: str) -> None:
    if not isinstance(last, Finish):
        raise UnavailableError(f"the answer of {server} broke off without a reason: ask again")


def _count_seconds(options: Options, target: _Target) -> float:
    deadline = deadline_of(options)
    return target.timeout if deadline is None else deadline
