"""The gRPC doors: Chat of the gateway, for clients, and Control of its service, for members."""

from contextlib import aclosing
from typing import Any

import grpc

from coordinator.planning.placement import Plan
from coordinator.recovery.survey import Survey
from coordinator.serving.gateway import Gateway
from coordinator.serving.service import LEAST_GAIN, Service
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import peer_name
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.role import audit
from unicluster.v1.chat_pb2 import (
    ChatInfo,
    DescribeChatRequest,
    GenerateRequest,
    Measured,
    MeasureRequest,
    TokenCount,
)
from unicluster.v1.chat_pb2_grpc import ChatServicer
from unicluster.v1.control_pb2 import (
    PlannedStage,
    PlanSummary,
    RebalanceRequest,
    SurveyReply,
    SurveyRequest,
)
from unicluster.v1.control_pb2_grpc import ControlServicer

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


class ControlDoor(ControlServicer):
    """Control of the service behind `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Survey(  # noqa: N802
        self, request: SurveyRequest, context: Context
    ) -> SurveyReply:
        try:
            return _reply(self._service, await self._service.survey())
        except UniclusterError as error:
            await abort(context, error)

    async def Rebalance(  # noqa: N802
        self, request: RebalanceRequest, context: Context
    ) -> SurveyReply:
        """Goes on with the move where the caller leaves."""
        audit.info("rebalancing, asked by %s", peer_name(context))
        try:
            return _reply(self._service, await self._service.rebalance())
        except UniclusterError as error:
            await abort(context, error)

    @property
    def _service(self) -> Service:
        if self._gateway.service is None:
            raise UnavailableError(self._gateway.why_not)
        return self._gateway.service


def _reply(service: Service, found: Survey) -> SurveyReply:
    return SurveyReply(
        model=service.display,
        standing=_summary(found.standing),
        better=_summary(found.better),
        gain=found.gain,
        worth=found.gain >= LEAST_GAIN,
    )


def _summary(plan: Plan) -> PlanSummary:
    stages = [
        PlannedStage(
            machine=stage.machine.name,
            first_layer=stage.first,
            end_layer=stage.end,
            token_s=stage.seconds_per_token,
            engine=stage.engine,
        )
        for stage in plan.stages
    ]
    return PlanSummary(
        stages=stages, token_s=plan.seconds_per_token, slowest_s=plan.slowest.seconds_per_token
    )
