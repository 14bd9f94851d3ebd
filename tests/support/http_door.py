"""The HTTP door in this event loop, over a gateway whose head does what the prompt says."""

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from coordinator.api.app import make_app
from coordinator.api.doorman import Doorman
from coordinator.api.server import LOOPBACK, listen, serving
from coordinator.fleet.head_watch import HeadWatch
from coordinator.serving.gateway import Gateway
from coordinator.serving.service import Service
from coordinator.state.database import Database
from coordinator.state.keys import Keys
from tests.support.chat_server import ScriptedChat
from unicluster.cluster.channels import bind, connect, make_server
from unicluster.cluster.sizes import CHAT_BYTES
from unicluster.trust.cluster import Cluster
from unicluster.v1.chat_pb2 import ChatInfo, Finish, Measured
from unicluster.v1.chat_pb2_grpc import ChatStub, add_ChatServicer_to_server


class Parrot:
    """A Service with one Deployment, which is this same object, as the gateway uses them."""

    display = "parrot q4"
    names = frozenset({"parrot q4", "parrot"})
    head_name = "ann"
    ring = 1
    moving = False

    def __init__(self, chat: Any) -> None:
        self.chat: Any = chat
        self.state = "ready"
        self.timing = self
        self.watch = HeadWatch(0.001, 512)
        self.finished: list[Finish] = []

    @property
    def deployment(self) -> "Parrot | None":
        return self if self.state == "ready" else None

    @property
    def why_not(self) -> str:
        return f"{self.display} is {self.state}: 3 of 12 GB are loaded"

    @property
    def ending(self) -> str:
        return "machine ann is gone"

    def answering(self, can_move: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[Finish], None]]:
        yield self.finished.append

    async def describe(self) -> ChatInfo:
        """What else the head knows: this one's template has tools."""
        info = self.info()
        info.tools = True
        return info

    async def measure(self) -> Measured:
        return Measured(info=self.info())

    def info(self) -> ChatInfo:
        asyncio.get_running_loop()  # raises in another thread, as of a Service
        info = ChatInfo(
            model=self.display, quant="q4", context=4096, users=4, state=self.state, detail=""
        )
        if self.state != "ready":
            info.detail, info.progress = "3 of 12 GB are loaded", 0.25
        return info


@dataclass
class Door:
    """`url` is where it is; `head` counts the answers that it is computing as `live`."""

    url: str
    head: ScriptedChat
    service: Parrot
    gateway: Gateway
    keys: Keys


@contextlib.asynccontextmanager
async def http_door(
    *, tls: ssl.SSLContext | None = None, is_open: bool = True, **options: Any
) -> AsyncIterator[Door]:
    """A door on a free port, with no keys yet; options are those of `make_app`."""
    cluster, head = Cluster.new(), ScriptedChat()
    gateway = Gateway(Parrot.display, recover_s=0)
    server = make_server(most_bytes=CHAT_BYTES)
    add_ChatServicer_to_server(head, server)
    port = bind(server, LOOPBACK, 0, cluster.issue("ann"))
    channel = connect(f"{LOOPBACK}:{port}", cluster.issue("me"))
    try:
        await server.start()
        service = Parrot(ChatStub(channel))
        gateway.service = cast(Service, service)
        listener = listen(LOOPBACK, 0)
        scheme = "http" if tls is None else "https"
        url = f"{scheme}://{LOOPBACK}:{listener.getsockname()[1]}"
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(Database(Path(folder, "state"))) as database,
        ):
            keys = Keys(database)
            app = make_app(gateway, Doorman(keys, is_open=is_open), **options)
            async with serving(app, listener, tls):
                yield Door(url, head, service, gateway, keys)
    finally:
        await channel.close()
        await server.stop(None)
