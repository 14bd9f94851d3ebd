"""The client library: ask the cluster and get an answer, at once or as it comes.

with Client() as client:
    print(client.chat("How many legs has a spider?").text)
    for event in client.stream("Tell me a story.", temperature=0.7):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Self, Unpack

import grpc
import grpc.aio

from unicluster.client.answers import (
    Answer,
    ChatInfo,
    Event,
    Finish,
    Messages,
    Options,
    collect,
    deadline_of,
    event_from_wire,
    info_from_wire,
    request_to_wire,
)
from unicluster.client.metrics import Metrics, metrics_from_wire
from unicluster.cluster.channels import as_error, connect, connect_sync
from unicluster.cluster.trust import ClientAccess, Cluster, Identity, Store, default_name
from unicluster.cluster.versions import mismatch
from unicluster.errors import UnavailableError
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatStub

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub


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
        self._channel: grpc.Channel | None = None

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The whole answer to a prompt or a conversation."""
        return collect(self.stream(messages, **options))

    def stream(
        self, messages: Messages, **options: Unpack[Options]
    ) -> Generator[Event, None, None]:
        """The answer as it comes: Delta after Delta, and a Finish at the end.

        Closing the generator before that stops the answer, and so does dropping it.
        """
        return self._events(request_to_wire(messages, options), deadline_of(options))

    def describe(self) -> ChatInfo:
        """What is served, and how it goes."""
        stub = self._stub()
        try:
            info = stub.Describe(wire.DescribeChatRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return info_from_wire(info)

    def measure(self) -> Metrics:
        """What was counted and measured. `Metrics.since` makes rates of two readings."""
        stub = self._stub()
        try:
            measured = stub.Measure(wire.MeasureRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return metrics_from_wire(measured)

    def close(self) -> None:
        """Answers that still run are stopped."""
        if self._channel:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stub(self) -> ChatStub:
        if self._channel is None:
            self._channel = connect_sync(self._target.find_sync(), self._target.identity)
        return ChatStub(self._channel)

    def _events(
        self, request: wire.GenerateRequest, deadline: float | None
    ) -> Generator[Event, None, None]:
        event: Event | None = None
        call = self._stub().Generate(request, timeout=deadline)
        try:
            for message in call:
                event = event_from_wire(message)
                yield event
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        _check_finished(event, self._target.address)


class AsyncClient:
    """The same as Client, for programs with an event loop."""

    def __init__(
        self,
        server: str | None = None,
        *,
        cluster: Cluster | ClientAccess | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._target = _Target(server, cluster, timeout)
        self._channel: grpc.aio.Channel | None = None

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The whole answer to a prompt or a conversation."""
        return collect([event async for event in self.stream(messages, **options)])

    def stream(self, messages: Messages, **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """The answer as it comes: Delta after Delta, and a Finish at the end.

        Closing the generator before that stops the answer, and so does dropping it.
        """
        return self._events(request_to_wire(messages, options), deadline_of(options))

    async def describe(self) -> ChatInfo:
        """What is served, and how it goes."""
        stub = await self._stub()
        try:
            info = await stub.Describe(wire.DescribeChatRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return info_from_wire(info)

    async def measure(self) -> Metrics:
        """What was counted and measured. `Metrics.since` makes rates of two readings."""
        stub = await self._stub()
        try:
            measured = await stub.Measure(wire.MeasureRequest(), timeout=self._target.timeout)
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        return metrics_from_wire(measured)

    async def close(self) -> None:
        """Answers that still run are stopped."""
        if self._channel:
            await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stub(self) -> "ChatAsyncStub":
        if self._channel is None:
            self._channel = connect(await self._target.find(), self._target.identity)
        return ChatStub(self._channel)

    async def _events(
        self, request: wire.GenerateRequest, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        event: Event | None = None
        call = (await self._stub()).Generate(request, timeout=deadline)
        try:
            async for message in call:
                event = event_from_wire(message)
                yield event
        except grpc.RpcError as error:
            raise as_error(error, self._target.address) from error
        finally:
            call.cancel()
        _check_finished(event, self._target.address)


class _Target:
    """The server to talk to, and who we are."""

    def __init__(
        self, server: str | None, cluster: Cluster | ClientAccess | None, timeout: float
    ) -> None:
        self.timeout = timeout
        self.address = server or os.environ.get("UNICLUSTER_SERVER", "")
        self._cluster = cluster

    @cached_property
    def identity(self) -> Identity:
        return self._access.issue(default_name())

    async def find(self) -> str:
        """The address: the one given, else that of the first front door that answers."""
        if not self.address:
            # Here, because zeroconf is slow to import and an address makes it needless.
            from unicluster.cluster.discovery import Browser
            from unicluster.cluster.records import Kind

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
                self.address = server.address
        return self.address

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


def _check_finished(last: Event | None, server: str) -> None:
    if not isinstance(last, Finish):
        raise UnavailableError(f"the answer of {server} broke off without a reason: ask again")
