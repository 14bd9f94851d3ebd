"""The client library: ask the cluster and get an answer, at once or as it comes.

with Client() as client:
    print(client.chat("How many legs has a spider?").text)
    for event in client.stream("Tell me a story.", temperature=0.7):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc
import grpc.aio

from unicluster.client.answers import (
    Answer,
    ChatInfo,
    Event,
    Options,
    Status,
    collect,
    deadline_of,
    info_from_wire,
    request_to_wire,
)
from unicluster.client.metrics import Metrics, metrics_from_wire
from unicluster.client.prompts import Messages
from unicluster.client.returning import Asking, Patience
from unicluster.client.target import Channels, Target
from unicluster.cluster.channels import as_error, channel_was_closed, connect, connect_sync
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.cluster import ClientAccess, Cluster
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatStub

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub

# To tell a server that an answer is not to be kept any longer.
ABANDON_SECONDS = 2.0

OnStatus = Callable[[Status], None] | None


class Client:
    """A client for programs without an event loop. Threads may share it.

    `server` is "HOST:PORT"; None: $UNICLUSTER_SERVER, else whichever machine of the cluster
    serves, found by mDNS within `timeout` seconds. `cluster` defaults to the one this machine
    is in. Connects when first used.

    An answer whose connection is lost goes on where it broke off, behind what is here, also with
    a coordinator that was started anew. For `resume` seconds, which the server is asked to keep
    the answer, the client comes back; 0: it does not; None: for 30, and the server keeps nothing:
    what is missing is computed again. `wait`: seconds to wait for a server that loads or recovers,
    before anything is asked; `on_status` hears how it is.

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
        resume: float | None = None,
        wait: float = 0.0,
    ) -> None:
        self._target = Target(server, cluster, timeout)
        self._patience = Patience(resume, wait)
        self._closed = False
        self._channels: Channels[grpc.Channel] = Channels(connect_sync)

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
        asking = Asking(request, self._patience, deadline_of(options))
        return self._events(asking, options.get("on_status"))

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
        self._closed = True
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

    def _events(self, asking: Asking, on_status: OnStatus) -> Generator[Event, None, None]:
        try:
            while not asking.finished:
                error: Exception | None = None
                try:
                    with self._stub() as stub:
                        call = _ask(stub, asking)
                        try:
                            for message in call:
                                for event in asking.take(message):
                                    if isinstance(event, Status):
                                        _report(event, on_status)
                                    else:
                                        yield event
                        finally:
                            call.cancel()  # type: ignore[no-untyped-call]
                except (grpc.RpcError, UnavailableError) as caught:
                    error = caught
                if not asking.finished:
                    self._prepare(asking, error, on_status)
        finally:
            if asking.kept and self._target.address:  # not worth a search of seconds
                self._abandon(asking.kept)

    def _prepare(self, asking: Asking, error: Exception | None, on_status: OnStatus) -> None:
        """Waits until the next attempt at an answer that broke off or was refused."""
        if self._closed:
            raise UnavailableError("the client was closed") from error
        server = self._target.address
        self._target.forget()
        pause, news = asking.broke_off(error, server)
        _report(news, on_status)
        while asking.waits:
            time.sleep(pause)
            pause, news = asking.looked(self._state())
            _report(news, on_status)
        time.sleep(pause)

    def _state(self) -> ChatInfo | UniclusterError:
        try:
            return self.describe()
        except UniclusterError as error:
            return error

    def _abandon(self, answer_id: str) -> None:
        """Lets go of an answer that the server keeps: it is complete, or nobody wants the rest."""
        with contextlib.suppress(grpc.RpcError, UniclusterError, ValueError), self._stub() as stub:
            stub.Abandon(wire.AbandonRequest(answer_id=answer_id), timeout=ABANDON_SECONDS)


class AsyncClient:
    """A client for programs with an event loop, with the methods and errors of Client."""

    def __init__(
        self,
        server: str | None = None,
        *,
        cluster: Cluster | ClientAccess | None = None,
        timeout: float = 10.0,
        resume: float | None = None,
        wait: float = 0.0,
    ) -> None:
        self._target = Target(server, cluster, timeout)
        self._patience = Patience(resume, wait)
        self._closed = False
        self._channels: Channels[grpc.aio.Channel] = Channels(connect)

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The whole answer to a prompt or a conversation."""
        return collect([event async for event in self.stream(messages, **options)])

    def stream(self, messages: Messages, **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """The answer as it comes: Delta after Delta, and a Finish at the end.

        Closing the generator before that stops the answer, and so does dropping it.
        """
        request = request_to_wire(messages, options)
        asking = Asking(request, self._patience, deadline_of(options))
        return self._events(asking, options.get("on_status"))

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
        self._closed = True
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

    async def _events(self, asking: Asking, on_status: OnStatus) -> AsyncGenerator[Event, None]:
        try:
            while not asking.finished:
                error: Exception | None = None
                try:
                    async with self._stub() as stub:
                        call = _ask_async(stub, asking)
                        try:
                            async for message in call:
                                for event in asking.take(message):
                                    if isinstance(event, Status):
                                        _report(event, on_status)
                                    else:
                                        yield event
                        finally:
                            call.cancel()
                except (grpc.RpcError, UnavailableError) as caught:
                    error = caught
                if not asking.finished:
                    await self._prepare(asking, error, on_status)
        finally:
            if asking.kept:
                await self._abandon(asking.kept)

    async def _prepare(self, asking: Asking, error: Exception | None, on_status: OnStatus) -> None:
        """Waits until the next attempt at an answer that broke off or was refused."""
        if self._closed:
            raise UnavailableError("the client was closed") from error
        server = self._target.address
        self._target.forget()
        pause, news = asking.broke_off(error, server)
        _report(news, on_status)
        while asking.waits:
            await asyncio.sleep(pause)
            pause, news = asking.looked(await self._state())
            _report(news, on_status)
        await asyncio.sleep(pause)

    async def _state(self) -> ChatInfo | UniclusterError:
        try:
            return await self.describe()
        except UniclusterError as error:
            return error

    async def _abandon(self, answer_id: str) -> None:
        """Lets go of an answer that the server keeps: it is complete, or nobody wants the rest."""
        try:
            async with asyncio.timeout(ABANDON_SECONDS), self._stub() as stub:
                await stub.Abandon(wire.AbandonRequest(answer_id=answer_id))
        except (grpc.RpcError, UniclusterError, grpc.aio.UsageError, TimeoutError):
            pass  # it ends by itself, a while later; UsageError: the client was closed
        except asyncio.CancelledError:
            if not channel_was_closed():
                raise


def _ask(stub: ChatStub, asking: Asking) -> "grpc.CallIterator[wire.GenerateEvent]":
    """The next call for an answer."""
    asked = asking.ask()
    if isinstance(asked, wire.ContinueRequest):
        return stub.Continue(asked, timeout=asking.timeout)
    return stub.Generate(asked, timeout=asking.timeout)


def _ask_async(
    stub: "ChatAsyncStub", asking: Asking
) -> "grpc.aio.UnaryStreamCall[Any, wire.GenerateEvent]":
    """The next call for an answer, in an event loop."""
    asked = asking.ask()
    if isinstance(asked, wire.ContinueRequest):
        return stub.Continue(asked, timeout=asking.timeout)
    return stub.Generate(asked, timeout=asking.timeout)


def _report(status: Status | None, on_status: OnStatus) -> None:
    if status is not None and on_status is not None:
        on_status(status)


def _count_seconds(options: Options, target: Target) -> float:
    deadline = deadline_of(options)
    return target.timeout if deadline is None else deadline
