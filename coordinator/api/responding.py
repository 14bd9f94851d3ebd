"""Sends answers: whole, or as a stream that is kept alive, and ends when its client leaves."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from coordinator.api.answering import Answers, answering
from coordinator.api.doorman import Meter
from coordinator.protocols.asked import EVENTS, Asked, as_json, comment
from coordinator.protocols.errors import failure_of
from coordinator.serving.gateway import Gateway
from unicluster.client.answers import Event, collect, event_from_wire
from unicluster.errors import UniclusterError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest

Admission = Callable[[Sequence[GenerateRequest]], AbstractContextManager[Meter]]

log = logging.getLogger(__name__)

# Until the first event of an answer an error is answered with its own status.
PATIENCE_SECONDS = 5.0
# A comment is sent after so long without an event.
KEEP_ALIVE_SECONDS = 10.0
# For a client to take what is sent to it.
SEND_SECONDS = 60.0


class Respond:
    """Answers one HTTP request, as an ASGI application: computes only while the client stays."""

    def __init__(self, gateway: Gateway, asked: Asked, caller: str, admission: Admission) -> None:
        """`admission` counts the answers and tokens of the caller's key."""
        self._gateway = gateway
        self._asked = asked
        self._caller = caller
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises UniclusterError for what went wrong before anything was sent."""
        answer = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, leaving):
                task.cancel()
            await asyncio.gather(answer, leaving, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        requests = self._asked.requests()
        if not requests:
            await self._gateway.check(self._asked.request)
        with self._admission(requests) as meter:
            await self._admitted(requests, meter, scope, receive, send)

    async def _admitted(
        self,
        requests: list[GenerateRequest],
        meter: Meter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        names = self._asked.names
        async with answering(self._gateway, requests, self._caller, meter, names) as answers:
            if self._asked.stream:
                await self._stream(answers, send)
            else:
                response = await self._whole(answers)
                async with asyncio.timeout(SEND_SECONDS):
                    await response(scope, receive, send)

    async def _whole(self, answers: Answers) -> "_Compact":
        events: list[list[Event]] = [[] for _ in range(self._asked.count)]
        while (item := await answers.next()) is not None:
            index, event = item
            if not event.HasField("status"):
                events[index].append(event_from_wire(event))
        return _Compact(self._asked.reply.whole([collect(each) for each in events]))

    async def _stream(self, answers: Answers, send: Send) -> None:
        parts = self._parts(answers)
        async with contextlib.aclosing(parts):
            first = await anext(parts)
            headers = [
                (b"content-type", self._asked.reply.media_type.encode()),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),  # else a proxy in front may hold it back
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _send(send, first)
            try:
                async for part in parts:
                    await _send(send, part)
            except TimeoutError:
                log.info("%s takes nothing of its answer: given up", self._caller)
                return
            except Exception as error:
                if not isinstance(error, UniclusterError):
                    log.exception("an answer for %s failed", self._caller)
                failure = failure_of(error).of_model(self._gateway.info(), self._gateway.why_not)
                await _send(send, self._asked.reply.failed(failure))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _parts(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The bytes of the stream; before the first there was an event, or PATIENCE_SECONDS."""
        reply = self._asked.reply
        patience = PATIENCE_SECONDS
        begun = False
        while True:
            event: GenerateEvent | None = None
            try:
                item = await answers.next(patience)
            except TimeoutError:
                pass
            else:
                if item is None:
                    break
                index, event = item
                if event.HasField("status") and not (begun and reply.media_type == EVENTS):
                    continue
            begin = b"" if begun else reply.begin()  # before what follows it: events are numbered
            if event is None:
                part = reply.waiting
            elif event.HasField("status"):
                part = comment(f"{event.status.state} {event.status.detail}")
            else:
                part = reply.event(index, event)
            yield begin + part
            begun = True
            patience = KEEP_ALIVE_SECONDS
        yield reply.end()


class _Compact(JSONResponse):
    """JSON as streams have it."""

    def render(self, content: object) -> bytes:
        return as_json(content).encode()


async def _send(send: Send, part: bytes) -> None:
    if part:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def caller_of(request: Request) -> str:
    """Who asks, for the log."""
    return f"{request.client.host}:{request.client.port}" if request.client else "unknown"
