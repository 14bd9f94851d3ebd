"""The gateway behind all doors: passes a request to the head, and the answer's events back.

An answer that breaks off goes on with the next head, behind what its client has.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial

import grpc

from coordinator.recovery.lifecycle import BrokenOff
from coordinator.recovery.recoveries import Gap, RecoveryMeter
from coordinator.serving.deployment import Deployment
from coordinator.serving.options import RECOVER_SECONDS
from coordinator.serving.service import CAUSE_SECONDS, MOVE_SECONDS, Service
from unicluster.chat_limits import check_limits
from unicluster.client.transcript import Transcript
from unicluster.cluster.channels import as_error, channel_was_closed
from unicluster.errors import (
    AnswerError,
    BusyError,
    InputError,
    NotFoundError,
    StageError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1.chat_pb2 import (
    ChatInfo,
    Finish,
    GenerateEvent,
    GenerateRequest,
    Measured,
    Status,
)

log = logging.getLogger(__name__)

# For the head to count the tokens of a prompt.
COUNT_SECONDS = 30.0
# At once, the waiting ones included; the head's own queue is shorter.
MOST_ANSWERS = 1024


class _BrokenOffError(Exception):
    """An answer broke off for a `reason` that may pass."""

    def __init__(self, reason: UniclusterError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Gateway:
    """Answers of the model that is served, whatever machines stand behind it at the moment.

    `service` is set once it is known what is served. `display` names the model until then.
    recover_s: how long an answer that broke off may wait for the model; 0: it ends.
    """

    def __init__(self, display: str, recover_s: float = RECOVER_SECONDS) -> None:
        self.service: Service | None = None
        self.display = display
        self.tokens = 0  # that clients have got
        self.running = 0  # answers
        self.recoveries = RecoveryMeter()
        self._recover_s = recover_s
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

        Where the answer breaks off, a Status says so, and another when it goes on. With
        `resume_s` in the request there is one Begun, by which its client can ask for the rest.
        caller: for the log. timeout: seconds for the whole answer. Whoever leaves early closes
        the iterator (`contextlib.aclosing`): then the head stops computing for it.

        Raises InputError that begins with a field's name, NotFoundError for another model,
        BusyError when too many answers run or wait, UnavailableError while no model can answer
        and when none could in time after a machine was lost, DoesNotFitError where none can any
        more, StageError when a machine fails again and again.
        """
        service, deployment = await self._admitted(request)
        request.ClearField("model")
        announced = not request.HasField("resume_s")
        request.ClearField("resume_s")
        request.begun = True
        transcript = Transcript(request)
        resumed = request.HasField("resume")
        clock = asyncio.get_running_loop().time
        ends = None if timeout is None else clock() + timeout
        gap: Gap | None = None
        began = heard = clock()
        first, tries = 0.0, 0
        self.running += 1
        try:
            while True:
                ring, had = service.ring, transcript.count
                alone = gap is None and not resumed
                try:
                    again = gap is not None
                    attempt = self._attempt(deployment, transcript, ends, again=again, alone=alone)
                    async with contextlib.aclosing(attempt) as events:
                        async for event in events:
                            if event.HasField("begun"):
                                if not announced:
                                    yield event
                                announced = True
                                continue
                            heard = clock()
                            if gap is not None:
                                self.recoveries.resumed(
                                    gap, heard, transcript.replayed, transcript.cached
                                )
                                gap_heard, gap = gap.heard, None
                                cause = service.cause_since(gap_heard - CAUSE_SECONDS)
                                yield _status("resumed", "", cause)
                            elif resumed and not first:
                                self.recoveries.returned(transcript.replayed, transcript.cached)
                            first = first or heard
                            if not alone and event.HasField("finish"):
                                _time(event.finish, began, first, heard)
                            self.tokens += len(event.delta.token_ids)
                            yield event
                    if transcript.finished:
                        return
                    raise UnavailableError(f"the head of {self.display} ended without a Finish")
                except _BrokenOffError as broken:
                    reason = broken.reason
                log.info("answer for %s broke off: %s", caller, reason)
                tries = 1 if transcript.count > had else tries + 1
                if not self._recover_s or not transcript.can_resume:
                    raise reason
                if gap is None:
                    gap = Gap(heard, clock())
                    yield _status(
                        "recovering", str(reason), service.cause_since(heard - CAUSE_SECONDS)
                    )
                deployment = await service.until_serving(
                    partial(self._broken_off, ring, reason, tries, gap, clock(), ends)
                )
                gap.planned, gap.loaded = deployment.planned_at, deployment.opened_at
        except UniclusterError as error:
            if gap is not None:
                self.recoveries.failed()
            log.info("answer for %s ended: %s", caller, error)
            raise
        finally:
            self.running -= 1

    async def _attempt(
        self,
        deployment: Deployment,
        transcript: Transcript,
        ends: float | None,
        *,
        again: bool,
        alone: bool,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Events of an answer by one head. Raises _BrokenOffError where another may go on.

        again: it broke off here. A client may say so of an answer, too, but has no place by that.
        alone: no other head has had a part in it, so its times say something of the machines.
        """
        if deployment.chat is None:
            raise _BrokenOffError(UnavailableError(deployment.ending))
        left = None if ends is None else max(ends - asyncio.get_running_loop().time(), 0.0)
        request = transcript.request()
        request.broke_off = again
        call = deployment.chat.Generate(request, timeout=left)

        def can_move() -> bool:
            return bool(self._recover_s) and transcript.can_resume

        try:
            with deployment.answering(can_move), deployment.timing.answer() as finished:
                while True:
                    try:
                        with deployment.watch.answer():
                            event = await call.read()
                    except grpc.aio.AioRpcError as broken:
                        raise _meaning(broken, deployment) from None
                    except asyncio.CancelledError:
                        if not channel_was_closed():
                            raise  # the client has gone
                        raise _BrokenOffError(UnavailableError(deployment.ending)) from None
                    if not isinstance(event, GenerateEvent):
                        return
                    for ready in transcript.take(event):
                        if alone and ready.HasField("finish"):
                            finished(ready.finish)
                        yield ready
                    if event.HasField("begun"):
                        yield event
        finally:
            # The client may have gone: the head must stop computing for it.
            call.cancel()

    def _broken_off(
        self,
        ring: int,
        reason: UniclusterError,
        tries: int,
        gap: Gap,
        tried: float,
        ends: float | None,
    ) -> BrokenOff:
        """An answer that waits, as it is now. tried: when its last attempt came to nothing."""
        now = asyncio.get_running_loop().time()
        limit = self._recover_s if ends is None else min(self._recover_s, ends - gap.broke)
        return BrokenOff(ring, reason, tries, now - gap.broke, now - tried, limit)

    async def count_tokens(self, request: GenerateRequest, timeout: float | None = None) -> int:
        """Tokens of a request's prompt, with its chat template. Changes and raises as `answer`."""
        _, deployment = await self._admitted(request)
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

    async def check(self, request: GenerateRequest) -> None:
        """Asks for no answer, but raises as `answer` where the model of a request gives none."""
        await self._admitted(request)

    async def describe(self) -> ChatInfo:
        """The service and its state. Raises UnavailableError while nothing is known of it."""
        if self.service is None:
            raise UnavailableError(self.why_not)
        return await self.service.describe()

    async def measure(self) -> Measured:
        """Metrics of the deployment; its state alone while there is no service."""
        if self.service is None:
            return Measured(info=self.info())
        measured = await self.service.measure()
        measured.recoveries.CopyFrom(self.recoveries.to_wire())
        return measured

    def info(self) -> ChatInfo:
        """Describes the deployment without asking any machine."""
        if self.service is None:
            return ChatInfo(model=self.display, state="loading", detail=self.why_not)
        return self.service.info()

    async def _admitted(self, request: GenerateRequest) -> tuple[Service, Deployment]:
        """The service and its deployment, once one answers. Raises what keeps it from that."""
        service = self.service
        if service is None:
            raise UnavailableError(self.why_not)
        check_limits(request)
        if request.begun:
            raise InputError("begun: only the coordinator asks a head for it: set resume_s")
        if request.broke_off:
            raise InputError("broke_off: only the coordinator says so to a head")
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
        return service, deployment


def _meaning(broken: grpc.aio.AioRpcError, deployment: Deployment) -> Exception:
    """Error with which an answer ends, or breaks off, that the head has ended so."""
    reason = as_error(broken, f"machine {deployment.head_name} (head)")
    if broken.code() is grpc.StatusCode.CANCELLED:
        return _BrokenOffError(UnavailableError(deployment.ending))
    if broken.code() is grpc.StatusCode.DEADLINE_EXCEEDED or isinstance(reason, AnswerError):
        return reason
    if isinstance(reason, UnavailableError | StageError):
        return _BrokenOffError(reason)
    if type(reason) is UniclusterError:  # of no kind: nobody there foresaw it, and once may be all
        return _BrokenOffError(
            StageError(f"machine {deployment.head_name} (head) failed: {reason}")
        )
    return reason


def _status(state: str, detail: str, cause: str) -> GenerateEvent:
    return GenerateEvent(status=Status(state=state, detail=detail, cause=cause))


def _time(finish: Finish, began: float, first: float, last: float) -> None:
    """Times of an answer of several heads, gaps included: each head knows its own part alone."""
    seconds, tokens = last - first, finish.usage.completion_tokens
    finish.timings.time_to_first_token_s = first - began
    finish.timings.decode_s = seconds
    finish.timings.tokens_per_s = (tokens - 1) / seconds if seconds > 0 and tokens else 0.0
