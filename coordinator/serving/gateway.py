"""The gateway behind all doors: passes a request to the head, and the answer's events back."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import grpc

from coordinator.serving.deployment import Deployment
from coordinator.serving.service import Service
from unicluster.chat_limits import check_limits
from unicluster.cluster.channels import as_error, channel_was_closed
from unicluster.errors import BusyError, NotFoundError, UnavailableError
from unicluster.v1.chat_pb2 import ChatInfo, GenerateEvent, GenerateRequest, Measured

log = logging.getLogger(__name__)

# How long an answer may wait while the model moves away from a machine that is drained.
MOVE_SECONDS = 60.0
# For the head to count the tokens of a prompt.
COUNT_SECONDS = 30.0
# At once, the waiting ones included; the head's own queue is shorter.
MOST_ANSWERS = 1024


class Gateway:
    """Answers of the model that is served, whatever machines stand behind it at the moment.

    `service` is set once it is known what is served. `display` names the model until then.
    """

    def __init__(self, display: str) -> None:
        self.service: Service | None = None
        self.display = display
        self.tokens = 0  # that clients have got
        self.running = 0  # answers
        self._waiting = 0  # for the model to move

    @property
    def why_not(self) -> str:
        """Reason for clients while no model can answer; empty when one can."""
        if self.service is None:
            return f"{self.display} is loading: inspecting the model"
        return "" if self.service.state == "ready" else self.service.why_not

    async def answer(
        self, request: GenerateRequest, caller: str, timeout: float | None = None
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Events of one answer, to the Finish. Changes `request`.

        caller: for the log. timeout: seconds for the whole answer. Whoever leaves early closes
        the iterator (`contextlib.aclosing`): then the head stops computing for it.

        Raises InputError that begins with a field's name, NotFoundError for another model,
        BusyError when too many answers run or wait, UnavailableError while no model can answer
        and when a machine is lost, StageError when one fails.
        """
        deployment = await self._admitted(request)
        request.ClearField("model")
        if deployment.chat is None:
            raise UnavailableError(deployment.ending)
        call = deployment.chat.Generate(request, timeout=timeout)
        self.running += 1
        try:
            with deployment.answering(), deployment.timing.answer() as finished:
                while True:
                    with deployment.watch.answer():
                        event = await call.read()
                    if not isinstance(event, GenerateEvent):
                        break
                    self.tokens += len(event.delta.token_ids)
                    if event.HasField("finish"):
                        finished(event.finish)
                    yield event
        except grpc.aio.AioRpcError as broken:
            ended = as_error(broken, f"machine {deployment.head_name} (head)")
            if broken.code() is grpc.StatusCode.CANCELLED:  # as below, but gRPC was quicker
                ended = UnavailableError(deployment.ending)
            log.info("answer for %s ended: %s", caller, ended)
            raise ended from None
        except asyncio.CancelledError:
            if not channel_was_closed():
                raise  # the client has gone
            raise UnavailableError(deployment.ending) from None
        finally:
            self.running -= 1
            # The client may have gone: the head must stop computing for it.
            call.cancel()

    async def count_tokens(self, request: GenerateRequest, timeout: float | None = None) -> int:
        """Tokens of a request's prompt, with its chat template. Changes and raises as `answer`."""
        deployment = await self._admitted(request)
        request.ClearField("model")
        if deployment.chat is None:
            raise UnavailableError(deployment.ending)
        try:
            counted = await deployment.chat.CountTokens(request, timeout=timeout or COUNT_SECONDS)
        except grpc.aio.AioRpcError as broken:
            raise as_error(broken, f"machine {deployment.head_name} (head)") from None
        except asyncio.CancelledError:
            if not channel_was_closed():
                raise  # the client has gone
            raise UnavailableError(deployment.ending) from None
        return counted.prompt_tokens

    async def describe(self) -> ChatInfo:
        """The service and its state. Raises UnavailableError while nothing is known of it."""
        if self.service is None:
            raise UnavailableError(self.why_not)
        return await self.service.describe()

    async def measure(self) -> Measured:
        """Metrics of the deployment; its state alone while there is no service."""
        if self.service is None:
            return Measured(info=self.info())
        return await self.service.measure()

    def info(self) -> ChatInfo:
        """Describes the deployment without asking any machine."""
        if self.service is None:
            return ChatInfo(model=self.display, state="loading", detail=self.why_not)
        return self.service.info()

    async def _admitted(self, request: GenerateRequest) -> Deployment:
        """The deployment that answers, once one can. Raises what keeps it from that."""
        service = self.service
        if service is None:
            raise UnavailableError(self.why_not)
        check_limits(request)
        if self.running + self._waiting >= MOST_ANSWERS:
            raise BusyError(f"{MOST_ANSWERS} answers run or wait here: try again later")
        if request.model and request.model not in service.names:
            raise NotFoundError(f"model: {request.model!r} is not served, {service.display!r} is")
        if service.moving:
            self._waiting += 1
            try:
                await service.until_moved(MOVE_SECONDS)
            finally:
                self._waiting -= 1
        deployment = service.deployment
        if deployment is None or deployment.chat is None:
            raise UnavailableError(service.why_not)
        return deployment
