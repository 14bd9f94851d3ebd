"""One model kept served over whatever machines there are."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import grpc

from coordinator.fleet.left_stages import LeftStages
from coordinator.fleet.members import Members
from coordinator.models.catalog import Source
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Objective, Plan
from coordinator.recovery import lifecycle
from coordinator.recovery.pauses import Pauses
from coordinator.recovery.survey import Survey, has_grown, offers
from coordinator.serving.ahead import loaded_ahead
from coordinator.serving.deployment import Deployment
from coordinator.serving.events import (
    Events,
    Moving,
    Planned,
    Ready,
    Recovered,
    Recovering,
    Retrying,
    Staying,
    WasAsleep,
    moves,
)
from coordinator.serving.inspected import Inspected
from coordinator.serving.options import Rebalancing
from coordinator.serving.plans import Plans
from coordinator.state.cut import Cut
from unicluster import failpoints
from unicluster.cluster.background import going_on
from unicluster.cluster.channels import channel_was_closed
from unicluster.cluster.records import ServiceRecord
from unicluster.dialing.dialer import Dialer
from unicluster.errors import (
    BusyError,
    DoesNotFitError,
    StageError,
    UnavailableError,
    UniclusterError,
    in_one_line,
)
from unicluster.retry import attempts, succeeded
from unicluster.stall import within
from unicluster.trust.identity import Credentials
from unicluster.v1.chat_pb2 import ChatInfo, DescribeChatRequest, Measured, MeasureRequest
from unicluster.v1.node_pb2 import StageSpec

log = logging.getLogger(__name__)

# Pauses between attempts to serve again; shorter where answers wait, or when machines change.
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 30.0
# For machines to be asked, a placement searched, and files looked for, each of which has a limit of
# its own; an attempt that takes longer waits for something that has none.
PLAN_SECONDS = 90.0
# For the head to say how it is.
HEAD_SECONDS = 5.0
# Between two looks at the machines for a better plan, unless one comes.
SURVEY_SECONDS = 15.0
# For running answers to end before the layers move to a better plan; then they go on there.
FINISH_SECONDS = 10.0
# How long new answers wait while the model moves, and so how long running ones keep it from that.
MOVE_SECONDS = 60.0
# A loss may show so much sooner than the ring breaks for it.
CAUSE_SECONDS = 2.0
# A plan that somebody asks for is no better if it saves less of a token's time.
LEAST_GAIN = 0.01

T = TypeVar("T")


class Service:
    """Plans, deploys, and when a machine is lost plans again over those that remain.

    It lives until it is cancelled, and `state` and `detail` say how it is; before the first
    deployment answers, what planning again can't mend ends it. What happens is published to
    `events`. While it answers it looks for better plans, and moves to them without cutting answers.
    """

    def __init__(
        self,
        source: Source,
        gguf: Source | None,
        inspected: Inspected,
        own_sources: list[str],
        members: Members,
        identity: Credentials,
        objective: Objective,
        nodes: list[str] | None,
        events: Events,
        generation: StageSpec,
        resume: Cut | None = None,
        last: Cut | None = None,
        rebalancing: Rebalancing | None = None,
        on_ready: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        """resume: where the layers are that a coordinator before has left, for the first plan.

        last: where they were when they were last served; that is preferred. on_ready: called with
        each plan whose model answers.
        """
        self.source = source
        self.variants = inspected.variants
        self.layout = self.variants.layout
        self._plans = Plans(
            *(source, gguf, inspected, objective, identity, own_sources, generation),
            last.plan if last is not None else None,
        )
        self._plans.resume(resume)
        self.deployment: Deployment | None = None
        self._members = members
        self._identity = identity
        self._nodes = nodes
        self._events = events
        self._dialer = Dialer(identity)
        self._left = LeftStages(self._dialer)
        self._rebalancing = rebalancing or Rebalancing()
        self._known: dict[str, int] = {}  # offers of machines that the last plan was made over
        self._better: Plan | None = None  # the plan to move to
        self._declined = ""  # why the last such plan came to nothing
        self._answered_at = 0.0  # by the event loop's clock
        self._taking_up = resume is not None
        self._on_ready = on_ready
        self._generation = generation
        self._life = lifecycle.State()
        self._comes_back = False  # whether the stages are for the next process of this service
        self._ready = asyncio.Event()
        self._turned = asyncio.Event()  # there is another deployment, or none, or another ring
        self._changed = asyncio.Event()  # anything else
        self._lost: list[Machine] = []  # just now, with the deployment that answered
        self._seen: Mapping[str, ServiceRecord] | None = None  # when the last attempt began
        self._pauses = Pauses(lambda seconds: members.changed(seconds, self._seen))

    @property
    def display(self) -> str:
        return self.source.display

    @property
    def names(self) -> set[str]:
        """Names by which clients may request the model."""
        return {self.source.display, self.source.model, self.source.display.split(" ")[0]}

    @property
    def state(self) -> str:
        """loading, ready, recovering or failed."""
        return self._life.name

    @property
    def ring(self) -> int:
        """The number of the ring that was opened last."""
        return self._life.ring

    @property
    def detail(self) -> str:
        """Why the state is what it is, in a sentence; empty when ready."""
        if self._life.problem or self._life.phase is lifecycle.Phase.READY:
            return self._life.problem
        loading = self._life.phase is lifecycle.Phase.LOADING
        return f"loading {self.display}" if loading else "looking for machines"

    @property
    def progress(self) -> str:
        """How far loading is, in a phrase; empty while nothing is loaded."""
        loading = self._life.phase is lifecycle.Phase.LOADING and self.deployment is not None
        return self.deployment.progress if loading and self.deployment is not None else ""

    @property
    def cause(self) -> str:
        """The cause of the loss for which it does not answer, in a word; empty: there is none."""
        if self._life.phase is lifecycle.Phase.READY:
            return ""
        return self.cause_since(self._answered_at - CAUSE_SECONDS)

    def cause_since(self, at: float) -> str:
        """The cause of the newest loss since `at`, by the event loop's clock; "" for none."""
        return self._events.cause_since(asyncio.get_running_loop().time() - at)

    @property
    def why_not(self) -> str:
        """Reason for clients while the model can't answer."""
        what = "can't be served" if self._life.stuck else f"is {self.state}"
        return f"{self.display} {what}: {self.detail}"

    def leave_stages(self) -> None:
        """Lets the stages stand for their grace when serving ends: the next process takes them."""
        self._comes_back = True

    async def until_ready(self) -> None:
        """Returns when the model answers for the first time."""
        await self._ready.wait()

    @property
    def moving(self) -> bool:
        """Whether layers leave machines that are there, and others have not taken over yet."""
        return self._life.moving or (self.deployment is not None and bool(self.deployment.draining))

    async def until_moved(self, timeout: float) -> None:
        """Returns when others have taken over from machines that the layers leave, or can't."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.moving:
                    self._turned.clear()
                    await self._turned.wait()

    async def until_serving(self, broken: Callable[[], lifecycle.BrokenOff]) -> Deployment:
        """The deployment with which an answer that broke off goes on. Raises its end otherwise.

        `broken` describes the answer as it is at the moment.
        """
        with self._pauses.waited_for():
            return await self._until_serving(broken)

    async def _until_serving(self, broken: Callable[[], lifecycle.BrokenOff]) -> Deployment:
        while True:
            decided = lifecycle.fate(self._life, broken(), self.display)
            if isinstance(decided, lifecycle.End):
                raise decided.error
            if isinstance(decided, lifecycle.GoOn) and self.deployment is not None:
                return self.deployment
            # To go on there must be a deployment: between two of them there is none for a moment.
            seconds = FIRST_RETRY_SECONDS
            if isinstance(decided, lifecycle.Wait):
                seconds = decided.seconds
            self._turned.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._turned.wait()

    async def describe(self) -> ChatInfo:
        """How the service is; what is known of lanes and caches comes from the head."""
        head = ChatInfo()
        if self.deployment is not None and self.deployment.chat is not None:
            asked = self.deployment.chat.Describe(DescribeChatRequest(), timeout=HEAD_SECONDS)
            head = await _answer_of_head(asked) or head
        info = self.info()  # as it is now: the head may be lost, and take long to say nothing
        info.live_caches = head.live_caches
        info.ring_s = head.ring_s
        info.tools, info.reasons = head.tools, head.reasons
        _copy_counts(head, info)
        return info

    async def measure(self) -> Measured:
        """Metrics of the head; without meters when there is no head."""
        head = None
        if self.deployment is not None and self.deployment.chat is not None:
            asked = self.deployment.chat.Measure(MeasureRequest(), timeout=HEAD_SECONDS)
            head = await _answer_of_head(asked)
        losses = {cause.value: count for cause, count in self._events.losses.items()}
        measured = Measured(info=self.info(), losses=losses)
        if head is not None:
            _copy_counts(head.info, measured.info)
            measured.meters.CopyFrom(head.meters)
        return measured

    def info(self) -> ChatInfo:
        """State and stages, without asking any machine."""
        info = ChatInfo(
            model=self.display,
            quant=self.layout.quant,
            context=self.layout.context,
            users=self.layout.users,
            state=self.state,
            detail="; ".join(filter(None, (self.detail, self.progress))),
            cause=self.cause,
        )
        if self.deployment is not None:
            info.stages.extend(self.deployment.stages)
            if self.state != "ready":
                info.progress = self.deployment.loaded
        return info

    async def run(self) -> None:
        """Serves until cancelled. Raises what keeps the first deployment from getting ready."""
        try:
            await self._run()
        finally:
            if not self._comes_back:
                await self._left.close()

    async def _run(self) -> None:
        async for attempt in attempts(
            f"serving {self.display}",
            lambda error: isinstance(error, UniclusterError) and self._may_retry,
            first=FIRST_RETRY_SECONDS,
            last=LAST_RETRY_SECONDS,
            pause=self._pauses.pause,
        ):
            with attempt:
                try:
                    await self._deploy_once()
                except UniclusterError as error:
                    if self._lose(error) or self._pauses.was_cut:
                        succeeded(attempt)
                    raise

    @property
    def _may_retry(self) -> bool:
        return self._life.phase is not lifecycle.Phase.ENDED

    def _lose(self, error: UniclusterError) -> bool:
        """Carries out the loss of the deployment; returns whether pauses begin anew."""
        answered = not self._life.stuck and self._life.ring > 0
        if self._life.phase is not lifecycle.Phase.WAITING:  # else the deployment has said it
            lacks = isinstance(error, DoesNotFitError)
            mendable = isinstance(error, UnavailableError | DoesNotFitError)
            actions = self._note(lifecycle.Lost(str(error), lacks, mendable))
            answered = lifecycle.Action.PAUSE_BRIEFLY in actions
        if answered:
            self._seen = None  # what changed while it answered is no news
        if self.deployment is not None and answered:
            self._lost = [left.machine for left in self.deployment.left if left.gone]
        self.deployment = None
        level = logging.INFO if self._life.move is not None else logging.WARNING
        log.log(level, "not serving: %s", error)
        return answered

    def _note(self, news: lifecycle.Event) -> lifecycle.Actions:
        """The state machine decides what follows, and it is done, as far as it takes no time."""
        before = self._life.phase
        self._life, actions = lifecycle.apply(self._life, news)
        deployment = self.deployment
        for action in actions:
            match action:
                case lifecycle.Action.ANNOUNCE_READY:
                    self._events.publish(Ready(self.display))
                case lifecycle.Action.ANNOUNCE_RECOVERED if deployment is not None:
                    moved = moves(self._plans.served, deployment.plan.stages)
                    self._events.publish(Recovered(self.display, moved))
                case lifecycle.Action.ANNOUNCE_LOSS:
                    self._events.publish(Recovering(self.display, self._life.problem))
                case lifecycle.Action.ANNOUNCE_RETRY:
                    self._events.publish(Retrying(self.display, self._life.problem))
                case lifecycle.Action.GO_BACK:
                    self._declined = self._life.problem
                    self._plans.go_back()
                case lifecycle.Action.LEAVE_STAGES if deployment is not None:
                    deployment.stages_stay = True
                case lifecycle.Action.WAKE_ANSWERS:
                    self._turned.set()
        if before is lifecycle.Phase.READY:
            self._answered_at = asyncio.get_running_loop().time()
        if self._life.phase is lifecycle.Phase.READY and deployment is not None:
            self._plans.stands(deployment.plan)
        self._changed.set()
        return actions

    async def _deploy_once(self) -> None:
        self._note(lifecycle.PauseOver())
        lost, self._lost = self._lost, []
        self._seen = self._members.found
        deployment = await self._in_time(self._planned(lost))
        placed = deployment.plan
        self._left.add(self._members.orphans)
        await self._left.release_but(placed.stages, deployment.specs)
        self.deployment = deployment
        self._note(lifecycle.Planned())
        running = asyncio.create_task(deployment.run())
        first = asyncio.create_task(deployment.until_ready())
        drained = asyncio.create_task(deployment.until_drained())
        moved = asyncio.create_task(self._move(deployment))
        looking = asyncio.create_task(self._look())
        storing = asyncio.create_task(deployment.timing.keep(self.measure))
        try:
            await asyncio.wait([running, first], return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                self._on_ready(placed)
                self._ready.set()
            await asyncio.wait([running, drained, moved], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                reason, move = "its layers move to other machines", lifecycle.Move.BETTER
                if drained.done():
                    reason = f"machine {deployment.draining} is being drained"
                    move = lifecycle.Move.DRAIN
                deployment.detail = reason
                self._note(lifecycle.Lost(reason, move=move))
                raise UnavailableError(reason)
            await running
        except asyncio.CancelledError:
            self._note(lifecycle.Stopped(self._comes_back))
            raise
        finally:
            tasks = running, first, drained, moved, looking, storing
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._left.add(deployment.left)

    async def _planned(self, lost: Sequence[Machine]) -> Deployment:
        """The next deployment, over the machines that there are."""
        machines = await self._machines(lost)
        await failpoints.reach_async("serve.plan")
        placed = await self._plans.next(machines, self._names(machines))
        await failpoints.reach_async("serve.planned")
        # What a coordinator before has planned was not planned over these machines.
        taken_up, self._taking_up = self._taking_up, False
        considered = {stage.machine.name for stage in placed.stages}
        self._known = offers(m for m in machines if not taken_up or m.name in considered)
        self._events.publish(Planned(self.display, self.variants, placed))
        return await self._deployment(placed, machines)

    async def _in_time(self, planned: Coroutine[Any, Any, Deployment]) -> Deployment:
        """The result of `planned`, whose every failure is of a kind that is tried again."""
        try:
            return await within(PLAN_SECONDS, planned)
        except TimeoutError:
            raise UnavailableError(f"no plan was made within {PLAN_SECONDS:.0f} s") from None
        except UniclusterError:
            raise
        except Exception as error:  # once it has begun, the answers that wait outlive it
            if not self._life.begun:
                raise
            log.exception("a plan could not be made")
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            raise UnavailableError(f"a plan could not be made: {reason}") from error

    def _names(self, machines: list[Machine]) -> list[str] | None:
        """Machines that may be used, None for all: once it began, those that are there."""
        if self._nodes is None or not self._life.begun:
            return self._nodes
        return [machine.name for machine in machines if machine.name in self._nodes]

    async def _deployment(self, placed: Plan, machines: list[Machine]) -> Deployment:
        files = await self._plans.files(placed, [machine.address for machine in machines])
        return Deployment(
            self.display,
            self.layout,
            placed,
            self._identity,
            self._events,
            files,
            self._generation,
            self._note,
        )

    async def _machines(
        self, lost: Sequence[Machine] = (), *, quiet: bool = False
    ) -> list[Machine]:
        """As `Members.machines`; sleep that they tell of is published."""
        machines = await self._members.machines(lost, quiet=quiet)
        for name, seconds in self._members.woken().items():
            self._events.publish(WasAsleep(name, seconds))
        return machines

    async def _look(self) -> None:
        """Looks for better plans, until cancelled, where machines have come since the last plan.

        So it learns of machines that are drained, too.
        """
        rules = self._rebalancing
        clock = asyncio.get_running_loop().time
        while True:
            await self._members.changed(min(SURVEY_SECONDS, max(rules.settle_s / 4, 1.0)))
            if self._life.phase is not lifecycle.Phase.READY or self._life.move is not None:
                continue
            with going_on("looking for a better plan"), contextlib.suppress(UniclusterError):
                machines = await self._machines(quiet=True)
                found = None
                if rules.margin is not None and has_grown(self._known, machines):
                    found = await self._plans.survey(machines, self._names(machines), rules.margin)
                worth = found is not None and found.gain >= (rules.margin or 1.0)
                self._offer(found, lifecycle.Surveyed(worth, clock(), rules.settle_s))

    def _offer(self, found: Survey | None, news: lifecycle.Surveyed | lifecycle.Asked) -> None:
        actions = self._note(news)
        if found is not None and lifecycle.Action.PREPARE in actions:
            self._better = found.better
            moved = moves(found.standing.stages, found.better.stages)
            self._events.publish(Moving(self.display, found.gain, moved))

    async def survey(self) -> Survey:
        """The plan that stands beside the best one. Raises UnavailableError where it answers not.

        Raises BusyError while it moves already.
        """
        self._check_stands()
        machines = await self._machines()
        found = await self._plans.survey(machines, self._names(machines), 2 * LEAST_GAIN)
        self._check_stands()  # still: that took seconds
        if found is None:
            raise UnavailableError("a machine has just been lost: try again later")
        return found

    def _check_stands(self) -> None:
        """Raises as `survey` does where no plan stands, or not for long."""
        if self._life.phase is not lifecycle.Phase.READY:
            raise UnavailableError(self.why_not)
        if self._life.move is not None:
            raise BusyError(f"{self.display} moves already")

    async def rebalance(self) -> Survey:
        """Moves to the best plan, if it is better at all, and returns when the model answers there.

        Raises as `survey` does, and StageError where the plan came to nothing: then the model
        answers where it did.
        """
        found = await self.survey()
        if found.gain < LEAST_GAIN:
            return found
        self._declined = ""
        self._offer(found, lifecycle.Asked(asyncio.get_running_loop().time()))
        while self._life.move is not None or self._life.phase is not lifecycle.Phase.READY:
            if self._life.phase is lifecycle.Phase.ENDED:
                raise UnavailableError("the model is being unloaded")
            self._changed.clear()
            await self._changed.wait()  # the caller's deadline ends it
        if moves(self._plans.served, found.better.stages):
            if not self._declined:
                raise UnavailableError("machines have come or gone meanwhile: try again")
            raise StageError(f"{self.display} answers where it did: {self._declined}")
        return found

    async def _move(self, deployment: Deployment) -> None:
        """Returns when the layers may leave for a better plan, which is the next then."""
        while True:
            await self._until_move(lifecycle.Move.PREPARING)
            better = self._better
            if better is None:
                continue
            try:
                machines = await self._machines(quiet=True)
                specs = (await self._deployment(better, machines)).specs
                busy = {stage.machine.name for stage in deployment.plan.stages}
                ahead = loaded_ahead(better, specs, busy, self._dialer, self._events)
                async with ahead as left:
                    self._left.add(left)
                    self._note(lifecycle.Prepared())
                    await deployment.until_movable(FINISH_SECONDS, MOVE_SECONDS)
            except Exception as error:  # whatever it is, the deployment that answers goes on
                if not isinstance(error, UniclusterError):
                    log.exception("a better plan could not be prepared")
                self._declined = in_one_line(error)
                log.warning("%s stays where it is: %s", self.display, self._declined)
                self._events.publish(Staying(self.display, self._declined))
                self._note(lifecycle.Abandoned())
                continue
            if self._life.move is lifecycle.Move.BETTER:
                self._plans.resume(Cut.of(better))
                return

    async def _until_move(self, move: lifecycle.Move) -> None:
        while self._life.move is not move:  # ended with the service's task
            self._changed.clear()
            await self._changed.wait()


def _copy_counts(head: ChatInfo, info: ChatInfo) -> None:
    info.lanes = head.lanes
    info.kept_caches = head.kept_caches
    info.kept_bytes = head.kept_bytes


async def _answer_of_head(call: Awaitable[T]) -> T | None:
    """The head's answer; None when it is gone: the state says so then."""
    try:
        return await call
    except grpc.aio.AioRpcError:
        return None
    except asyncio.CancelledError:
        if not channel_was_closed():
            raise
        return None
