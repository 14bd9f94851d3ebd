"""The gateway: passes a client's request to the head, and its answer back."""

import asyncio
import logging
from typing import Any

import grpc

from coordinator.serving.service import Service
from unicluster.chat_limits import check_limits
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import as_error, channel_was_closed, peer_name
from unicluster.errors import BusyError, InputError, NotFoundError, UnavailableError
from unicluster.v1.chat_pb2 import (
    ChatInfo,
    DescribeChatRequest,
    GenerateRequest,
    Measured,
    MeasureRequest,
)
from unicluster.v1.chat_pb2_grpc import ChatServicer

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# How long an answer may wait while the model moves away from a machine that is drained.
MOVE_SECONDS = 60.0
# At once, the waiting ones included; the head's own queue is shorter.
MOST_ANSWERS = 1024


class Gateway(ChatServicer):
    """The Chat service that clients see, whatever machines stand behind it at the moment.

    `service` is set once it is known what is served.
    """

    def __init__(self, display: str) -> None:
        self.service: Service | None = None
        self.tokens = 0  # that clients have got
        self.running = 0  # answers
        self._waiting = 0  # for the model to move
        self._display = display
        self._inspecting = f"{display} is loading: inspecting the model"

    async def Generate(self, request: GenerateRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        service = self.service
        if service is None:
            await abort(context, UnavailableError(self._inspecting))
        try:
            check_limits(request)
        except InputError as refused:
            await abort(context, refused)
        if self.running + self._waiting >= MOST_ANSWERS:
            reason = f"{MOST_ANSWERS} answers run or wait here: try again later"
            await abort(context, BusyError(reason))
        if request.model and request.model not in service.names:
            error = NotFoundError(f"model: {request.model!r} is not served, {service.display!r} is")
            await abort(context, error)
        if service.moving:
            self._waiting += 1
            try:
                await service.until_moved(MOVE_SECONDS)
            finally:
                self._waiting -= 1
        deployment = service.deployment
        if deployment is None or deployment.chat is None:
            await abort(context, UnavailableError(service.why_not))
        request.ClearField("model")
        call = deployment.chat.Generate(request, timeout=context.time_remaining())
        self.running += 1
        try:
            with deployment.answering(), deployment.timing.answer() as finished:
                async for event in call:
                    self.tokens += len(event.delta.token_ids)
                    if event.HasField("finish"):
                        finished(event.finish)
                    await context.write(event)
        except grpc.aio.AioRpcError as broken:
            ended = as_error(broken, f"machine {deployment.head_name} (head)")
            if broken.code() is grpc.StatusCode.CANCELLED:  # as below, but gRPC was quicker
                ended = UnavailableError(deployment.ending)
            log.info("answer for %s ended: %s", peer_name(context), ended)
            await abort(context, ended)
        except asyncio.CancelledError:
            if not channel_was_closed():
                raise  # the client has gone
            await abort(context, UnavailableError(deployment.ending))
        finally:
            self.running -= 1
            # The client may have gone: the head must stop computing for it.
            call.cancel()

    async def Describe(  # noqa: N802
        self, request: DescribeChatRequest, context: Context
    ) -> ChatInfo:
        if self.service is None:
            await abort(context, UnavailableError(self._inspecting))
        return await self.service.describe()

    async def Measure(self, request: MeasureRequest, context: Context) -> Measured:  # noqa: N802
        return await self.measure()

    async def measure(self) -> Measured:
        """Metrics of the deployment; its state alone while there is no service."""
        if self.service is None:
            return Measured(info=ChatInfo(model=self._display, state="loading"))
        return await self.service.measure()
