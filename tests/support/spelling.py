"""A gateway's gRPC door over a line that can be cut; its head spells as far as a test allows."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc.aio

from coordinator.serving.chat_door import ChatDoor
from coordinator.serving.gateway import Gateway
from coordinator.serving.service import Service
from tests.support.http_door import Parrot
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.trust.cluster import Cluster
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatServicer, ChatStub, add_ChatServicer_to_server

HOST = "127.0.0.1"
PROMPT = [7, 8, 9]
TOKENS = 20
# Each token has two events, of which the first has no token.
TEXT = "".join(f"<{token}>" for token in range(TOKENS))


class SpellingHead(ChatServicer):
    """Sends the tokens of TEXT below `allowed`; of that one itself the half without the token."""

    def __init__(self) -> None:
        self.live = 0
        self.sent = 0  # tokens, of all answers
        self.asked: list[wire.GenerateRequest] = []
        self.allowed = 0
        self.padding = ""  # of each text
        self._allowed = asyncio.Event()

    def allow(self, tokens: int = TOKENS) -> None:
        self.allowed = tokens
        event, self._allowed = self._allowed, asyncio.Event()
        event.set()

    async def Generate(self, request: wire.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.asked.append(request)
        self.live += 1
        try:
            again = request.HasField("resume")
            begun = wire.Begun(prompt_token_ids=[] if again else PROMPT)
            await context.write(wire.GenerateEvent(begun=begun))
            for token in range(len(request.resume.token_ids), TOKENS):
                await context.write(_delta(f"<{self.padding}"))
                while token >= self.allowed:
                    await self._allowed.wait()
                await context.write(_delta(f"{token}>", token))
                self.sent += 1
            usage = wire.Usage(prompt_tokens=len(PROMPT), completion_tokens=TOKENS)
            finish = wire.Finish(reason="length", usage=usage)
            await context.write(wire.GenerateEvent(finish=finish))
        finally:
            self.live -= 1


def _delta(text: str, *tokens: int) -> wire.GenerateEvent:
    return wire.GenerateEvent(delta=wire.Delta(text=text, token_ids=tokens))


class Line:
    """Passes TCP connections on to `target`; cut, it breaks them and takes no others."""

    def __init__(self) -> None:
        self.target = 0  # a port
        self.is_cut = False
        self._ends: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """The address of its beginning, while the block runs."""
        server = await asyncio.start_server(self._connected, HOST, 0)
        try:
            yield f"{HOST}:{server.sockets[0].getsockname()[1]}"
        finally:
            self.cut()
            server.close()
            for task in self._passing:
                task.cancel()
            await asyncio.gather(*self._passing, return_exceptions=True)

    def cut(self) -> None:
        self.is_cut = True
        for end in self._ends:
            end.transport.abort()

    def mend(self) -> None:
        self.is_cut = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            there, onward = await asyncio.open_connection(HOST, self.target)
        except OSError:
            writer.transport.abort()
            return
        self._ends |= {writer, onward}
        for source, sink in ((reader, onward), (there, writer)):
            task = asyncio.create_task(_pass(source, sink))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    sink.transport.abort()


class SpellingServer:
    """A server in a test's hands: `address` leads to the door over `line`."""

    def __init__(self, cluster: Cluster, head: SpellingHead, chat: Any, line: Line) -> None:
        self.cluster = cluster
        self.head = head
        self.line = line
        self.address = ""
        self.service = Parrot(chat)
        self.gateway: Gateway
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """A coordinator that knows nothing of any answer."""
        self.gateway = Gateway(Parrot.display, recover_s=0)
        self.gateway.service = cast(Service, self.service)
        door = ChatDoor(self.gateway)
        server = make_server()
        add_ChatServicer_to_server(door, server)
        clients = self.cluster.client_access.authority.ca_pem
        self.line.target = bind(
            server, HOST, 0, self.cluster.issue("server"), admitted=lambda: clients
        )
        await server.start()
        self._stack.push_async_callback(door.aclose)
        self._stack.push_async_callback(server.stop, None)

    async def stop(self) -> None:
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def spelling_server() -> AsyncIterator[SpellingServer]:
    cluster, head, line = Cluster.new(), SpellingHead(), Line()
    server: grpc.aio.Server = make_server()
    add_ChatServicer_to_server(head, server)
    port = bind(server, HOST, 0, cluster.issue("ann"))
    await server.start()
    try:
        async with connect(f"{HOST}:{port}", cluster.issue("me")) as channel, line.running() as at:
            served = SpellingServer(cluster, head, ChatStub(channel), line)
            served.address = at
            await served.start()
            try:
                yield served
            finally:
                await served.stop()
    finally:
        await server.stop(None)
