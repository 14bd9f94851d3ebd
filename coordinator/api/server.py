"""The HTTP server of the doors: uvicorn in the event loop of `serve`."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from unicluster.cluster.channels import check_free
from unicluster.errors import InputError

LOOPBACK = "127.0.0.1"
FLAG = "--http-port"
# Connections at once; more are answered with 503.
MOST_CONNECTIONS = 4096
# Between two requests of a connection.
IDLE_SECONDS = 75
# For the head of a request, once the connection stands or its first byte has come.
HEAD_SECONDS = 20
# For a client to take some more of what was sent to it.
TAKE_SECONDS = 60.0
# Answers that run when the door closes have this long.
GRACE_SECONDS = 1
LOOK_SECONDS = 0.02


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Hangs up on who never completes the head of a request, or takes nothing of an answer."""

    _deadline: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # So that writing is paused as long as anything waits to be taken: a transport that is
        # closed would wait for that without end.
        transport.set_write_buffer_limits(high=1, low=0)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_taking(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _watch_taking(self, waiting: int) -> None:
        """Hangs up after TAKE_SECONDS in which nothing of the `waiting` bytes was taken."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < waiting:
                self._watch_taking(left)
            else:
                self.transport.abort()

        self._taking = self.loop.call_later(TAKE_SECONDS, look)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif waiting and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises InputError where it can't."""
    check_free(host, port, FLAG)
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port),
            family=family if host or socket.has_dualstack_ipv6() else socket.AF_INET,
            dualstack_ipv6=not host and socket.has_dualstack_ipv6(),
            backlog=1024,
        )
    except OSError as error:
        raise InputError(f"can't listen on {host}:{port}: {error.strerror}: {FLAG}") from error


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Serves `app` at `listener` while the block runs; without `tls` in plain text."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # errors are logged where they are answered
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise InputError(f"the HTTP server did not start: {FLAG}")
            await asyncio.sleep(LOOK_SECONDS)
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listener.close()
