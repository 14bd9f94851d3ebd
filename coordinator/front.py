"""The front door: passes a client's request to the head, and its answer back."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from coordinator.service import Service
from unicluster.channels import peer_name
from unicluster.errors import NotFoundError, UnavailableError
from unicluster.status import abort
from unicluster.v1.chat_pb2 import ChatInfo, DescribeChatRequest, GenerateEvent, GenerateRequest
from unicluster.v1.chat_pb2_grpc import ChatServicer

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Front(ChatServicer):
    """The Chat service that clients see, whatever machines stand behind it at the moment."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> AsyncIterator[GenerateEvent]:
        service = self._service
        if request.model and request.model not in service.names:
            await abort(
                context,
                NotFoundError(f"model: {request.model!r} is not served here; {service.display} is"),
            )
        deployment = service.deployment
        if deployment is None or deployment.chat is None:
            await abort(context, UnavailableError(f"{service.display}: {service.detail}"))
            return
        forwarded = GenerateRequest()
        forwarded.CopyFrom(request)
        forwarded.model = ""
        call = deployment.chat.Generate(forwarded, timeout=context.time_remaining())
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            log.info("answer for %s ended: %s", peer_name(context), error.details())
            details = error.details() or error.code().name
            if deployment.chat is None or "ocket closed" in details:
                details = f"machine {deployment.head_name} (head) went away in mid-answer"
            await context.abort(error.code(), details)
        finally:
            # The client may have gone: the head must stop computing for it.
            call.cancel()

    async def Describe(  # noqa: N802
        self, request: DescribeChatRequest, context: Context
    ) -> ChatInfo:
        return await self._service.describe()
