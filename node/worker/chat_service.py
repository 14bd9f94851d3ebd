"""The Chat service of a head: its engine's answers over gRPC."""

from typing import Any

import grpc.aio

from node.generation.engine import GenerationEngine
from unicluster.cluster.abort import abort
from unicluster.errors import NotFoundError, UniclusterError
from unicluster.v1.chat_pb2 import (
    AbandonReply,
    AbandonRequest,
    ChatInfo,
    ContinueRequest,
    DescribeChatRequest,
    GenerateEvent,
    GenerateRequest,
    Measured,
    MeasureRequest,
    TokenCount,
)
from unicluster.v1.chat_pb2_grpc import ChatServicer

KEPT_ELSEWHERE = "answer_id: answers are kept by the coordinator, not by a head"


class ChatService(ChatServicer):
    """Chat over `engine`, which generates the answers."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine

    async def Generate(  # type: ignore[override]  # noqa: N802
        self,
        request: GenerateRequest,
        context: "grpc.aio.ServicerContext[GenerateRequest, GenerateEvent]",
    ) -> None:
        """Streams an answer. A client that cancels, leaves or is out of time ends it."""
        try:
            ticket = await self._engine.submit(request)
            # Not a generator: those are only closed when collected, and caches would wait for it.
            try:
                async for event in ticket:
                    await context.write(event)
            finally:
                ticket.cancel()
        except UniclusterError as error:
            await abort(context, error)

    async def Continue(  # type: ignore[override]  # noqa: N802
        self, request: ContinueRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Refused: a head keeps nothing for those who leave."""
        await abort(context, NotFoundError(KEPT_ELSEWHERE))

    async def Abandon(  # noqa: N802
        self, request: AbandonRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AbandonReply:
        """Refused likewise."""
        await abort(context, NotFoundError(KEPT_ELSEWHERE))

    async def CountTokens(  # noqa: N802
        self, request: GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> TokenCount:
        """Tokens of the request's prompt, with its chat template."""
        try:
            return TokenCount(prompt_tokens=await self._engine.count_tokens(request))
        except UniclusterError as error:
            await abort(context, error)

    async def Describe(  # noqa: N802
        self, request: DescribeChatRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> ChatInfo:
        """The model that is served, and whether it can answer."""
        return self._engine.describe()

    async def Measure(  # noqa: N802
        self, request: MeasureRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> Measured:
        """Counters and timings since the engine started."""
        return Measured(info=self._engine.describe(), meters=self._engine.measure())
