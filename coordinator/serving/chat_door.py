"""The gRPC door of the gateway: the Chat service that clients see."""

from contextlib import aclosing
from typing import Any

import grpc

from coordinator.serving.gateway import Gateway
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import peer_name
from unicluster.errors import UniclusterError
from unicluster.v1.chat_pb2 import (
    ChatInfo,
    DescribeChatRequest,
    GenerateRequest,
    Measured,
    MeasureRequest,
    TokenCount,
)
from unicluster.v1.chat_pb2_grpc import ChatServicer

Context = grpc.aio.ServicerContext[Any, Any]


class ChatDoor(ChatServicer):
    """Chat over `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(self, request: GenerateRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Streams an answer. A client that cancels, leaves or is out of time ends it."""
        events = self._gateway.answer(request, peer_name(context), context.time_remaining())
        try:
            async with aclosing(events):
                async for event in events:
                    if request.statuses or not event.HasField("status"):
                        await context.write(event)
        except UniclusterError as error:
            await abort(context, error)

    async def CountTokens(  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> TokenCount:
        """Tokens of the request's prompt, with its chat template."""
        try:
            count = await self._gateway.count_tokens(request, context.time_remaining())
        except UniclusterError as error:
            await abort(context, error)
        return TokenCount(prompt_tokens=count)

    async def Describe(  # noqa: N802
        self, request: DescribeChatRequest, context: Context
    ) -> ChatInfo:
        try:
            return await self._gateway.describe()
        except UniclusterError as error:
            await abort(context, error)

    async def Measure(self, request: MeasureRequest, context: Context) -> Measured:  # noqa: N802
        return await self._gateway.measure()
