"""The gRPC doors: Chat of the gateway, for clients, and Control of its service, for members."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from coordinator.planning.placement import Plan
from coordinator.recovery.kept_answers import KeptAnswer, KeptAnswers, check_seconds
from coordinator.recovery.survey import Survey
from coordinator.serving.gateway import Gateway
from coordinator.serving.service import LEAST_GAIN, Service
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import peer_name
from unicluster.cluster.roles import caller_of
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.role import audit
from unicluster.v1.chat_pb2 import (
    AbandonReply,
    AbandonRequest,
    ChatInfo,
    ContinueRequest,
    DescribeChatRequest,
    GenerateEvent,
    GenerateRequest,
    Kept,
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
Answer = AsyncGenerator[GenerateEvent, None]


class ChatDoor(ChatServicer):
    """Chat over `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._kept = KeptAnswers()

    async def Generate(self, request: GenerateRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Streams an answer.

        A client that cancels, leaves or is out of time ends it, unless it said it would come back.
        """
        try:
            events = self._answer(request, context)
            await _send(events, context)
        except UniclusterError as error:
            await abort(context, error)

    async def Continue(self, request: ContinueRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Streams the rest of an answer that is kept for this client."""
        try:
            answer = self._kept.find(_owner(context), request.answer_id)
            await _send(answer.read(request.events), context)
        except UniclusterError as error:
            await abort(context, error)

    async def Abandon(self, request: AbandonRequest, context: Context) -> AbandonReply:  # noqa: N802
        """Ends an answer that is kept for this client."""
        self._kept.abandon(_owner(context), request.answer_id)
        return AbandonReply()

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

    async def aclose(self) -> None:
        """Ends the answers that are kept."""
        await self._kept.close()

    def _answer(self, request: GenerateRequest, context: Context) -> Answer:
        """Events of an answer, which is kept where its client asks for that and there is room."""
        seconds, statuses, owner = request.resume_s, request.statuses, _owner(context)
        check_seconds(seconds)
        events = self._gateway.answer(request, peer_name(context), context.time_remaining())
        if not statuses:
            events = _without_statuses(events)
        if seconds and owner and self._kept.has_room(owner):
            return _kept(self._kept.keep(owner, events, seconds))
        return events


async def _kept(answer: KeptAnswer) -> Answer:
    """A kept answer from its beginning, and before it by which id its client can have the rest."""
    try:
        yield GenerateEvent(kept=Kept(answer_id=answer.id, resume_s=answer.seconds))
        async with aclosing(answer.read(0)) as events:
            async for event in events:
                yield event
    finally:
        answer.leave()


async def _without_statuses(events: Answer) -> Answer:
    async with aclosing(events):
        async for event in events:
            if not event.HasField("status"):
                yield event


async def _send(events: Answer, context: Context) -> None:
    # Closed here, because a generator that is only dropped ends later, and its caches with it.
    async with aclosing(events):
        async for event in events:
            await context.write(event)


def _owner(context: Context) -> str:
    """Whose answers they are: the holder of the key that the caller has proved to have."""
    return caller_of(context)[1]


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
