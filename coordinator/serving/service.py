"""One model kept served over whatever machines there are."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from coordinator.fleet.left_stages import LeftStages
from coordinator.fleet.measured import Measurements
from coordinator.fleet.members import Members
from coordinator.models.catalog import Source
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Objective, Plan, Stage
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import scaled
from coordinator.recovery import lifecycle
from coordinator.recovery.keeping import keeping
from coordinator.serving.deployment import Deployment, Files
from coordinator.serving.events import (
    Events,
    Planned,
    Ready,
    Recovered,
    Recovering,
    moves,
)
from coordinator.serving.inspected import Inspected
from coordinator.serving.sourcing import hub_files
from coordinator.state.cut import Cut
from unicluster.cluster.channels import channel_was_closed
from unicluster.dialing.dialer import Dialer
from unicluster.errors import DoesNotFitError, UnavailableError, UniclusterError
from unicluster.retry import attempts, succeeded
from unicluster.trust.identity import Credentials
from unicluster.v1.chat_pb2 import ChatInfo, DescribeChatRequest, Measured, MeasureRequest
from unicluster.v1.node_pb2 import Draft, StageSpec

log = logging.getLogger(__name__)

# Pauses between attempts to serve again after a loss, which end when a machine comes or goes.
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 30.0
# For the head to say how it is.
HEAD_SECONDS = 5.0

T = TypeVar("T")


class Service:
    """Plans, deploys, and when a machine is lost plans again over those that remain.

    The first deployment must succeed; from then on the service lives until it is cancelled,
    and `state` and `detail` say how it is. What happens is published to `events`.
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
        on_ready: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        """resume: where the layers are that a coordinator before has left, for the first plan.

        on_ready: called with each plan whose model answers.
        """
        self.source = source
        self.variants = inspected.variants
        self.layout = self.variants.layout
        both = (source, gguf)
        self._models = {
            engine: model
            for engine, model in zip(inspected.by_engine, both, strict=False)
            if model is not None
        }
        self._inspected = inspected
        self._own_sources = own_sources  # where this process itself offers the files
        self.deployment: Deployment | None = None
        self._members = members
        self._identity = identity
        self._objective = objective
        self._nodes = nodes
        self._events = events
        self._served: tuple[Stage, ...] = ()  # that answered last
        self._left = LeftStages(Dialer(identity))
        self._resume = resume
        self._on_ready = on_ready
        self._generation = generation
        self._life = lifecycle.State()
        self._ready = asyncio.Event()
        self._turned = asyncio.Event()  # there is another deployment, or none, or another ring
        self._lost: list[Machine] = []  # just now, with the deployment that answered

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
    def why_not(self) -> str:
        """Reason for clients while the model can't answer."""
        what = "can't be served" if self._life.stuck else f"is {self.state}"
        return f"{self.display} {what}: {self.detail}"

    async def until_ready(self) -> None:
        """Returns when the model answers for the first time."""
        await self._ready.wait()

    @property
    def moving(self) -> bool:
        """Whether a machine is being drained and others have not taken over yet."""
        return self._life.moving or (self.deployment is not None and bool(self.deployment.draining))

    async def until_moved(self, timeout: float) -> None:
        """Returns when others have taken over from a machine that is drained, or can't."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.moving:
                    self._turned.clear()
                    await self._turned.wait()

    async def until_serving(self, broken: Callable[[], lifecycle.BrokenOff]) -> Deployment:
        """The deployment with which an answer that broke off goes on. Raises its end otherwise.

        `broken` describes the answer as it is at the moment.
        """
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
        info = self.info()
        if self.deployment is not None and self.deployment.chat is not None:
            asked = self.deployment.chat.Describe(DescribeChatRequest(), timeout=HEAD_SECONDS)
            head = await _answer_of_head(asked) or ChatInfo()
            info.live_caches = head.live_caches
            info.ring_s = head.ring_s
            _copy_counts(head, info)
        return info

    async def measure(self) -> Measured:
        """Metrics of the head; without meters when there is no head."""
        losses = {cause.value: count for cause, count in self._events.losses.items()}
        measured = Measured(info=self.info(), losses=losses)
        if self.deployment is not None and self.deployment.chat is not None:
            asked = self.deployment.chat.Measure(MeasureRequest(), timeout=HEAD_SECONDS)
            if (head := await _answer_of_head(asked)) is not None:
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
            detail=self.detail,
        )
        if self.deployment is not None:
            info.stages.extend(self.deployment.stages)
        return info

    async def run(self) -> None:
        """Serves until cancelled. Raises what keeps the first deployment from getting ready."""
        try:
            await self._run()
        finally:
            await self._left.close()

    async def _run(self) -> None:
        async for attempt in attempts(
            f"serving {self.display}",
            lambda error: isinstance(error, UniclusterError) and self._may_retry,
            first=FIRST_RETRY_SECONDS,
            last=LAST_RETRY_SECONDS,
            pause=self._members.changed,
        ):
            with attempt:
                try:
                    await self._deploy_once()
                except UniclusterError as error:
                    if self._lose(error):
                        succeeded(attempt)
                    raise

    @property
    def _may_retry(self) -> bool:
        return self._life.phase is not lifecycle.Phase.ENDED

    def _lose(self, error: UniclusterError) -> bool:
        """Carries out the loss of the deployment; returns whether pauses begin anew."""
        answered = not self._life.stuck
        if self._life.phase is not lifecycle.Phase.WAITING:  # else the deployment has said it
            lacks = isinstance(error, DoesNotFitError)
            actions = self._note(lifecycle.Lost(str(error), lacks_memory=lacks))
            answered = lifecycle.Action.PAUSE_BRIEFLY in actions
        if self.deployment is not None and answered:
            self._lost = [left.machine for left in self.deployment.left if left.gone]
        self.deployment = None
        log.warning("not serving: %s", error)
        return answered

    def _note(self, news: lifecycle.Event) -> lifecycle.Actions:
        """The state machine decides what follows, and it is done, as far as it takes no time."""
        self._life, actions = lifecycle.apply(self._life, news)
        deployment = self.deployment
        for action in actions:
            match action:
                case lifecycle.Action.ANNOUNCE_READY:
                    self._events.publish(Ready(self.display))
                case lifecycle.Action.ANNOUNCE_RECOVERED if deployment is not None:
                    moved = moves(self._served, deployment.plan.stages)
                    self._events.publish(Recovered(self.display, moved))
                case lifecycle.Action.ANNOUNCE_LOSS:
                    self._events.publish(Recovering(self.display, self._life.problem))
                case lifecycle.Action.LEAVE_STAGES if deployment is not None:
                    deployment.stages_stay = True
                case lifecycle.Action.WAKE_ANSWERS:
                    self._turned.set()
        if self._life.phase is lifecycle.Phase.READY and deployment is not None:
            self._served = deployment.plan.stages
        return actions

    async def _deploy_once(self) -> None:
        self._note(lifecycle.PauseOver())
        lost, self._lost = self._lost, []
        machines = await self._members.machines(lost)
        names = self._nodes
        if names is not None and self._ready.is_set():
            names = [machine.name for machine in machines if machine.name in names]
        placed = self._resumed(machines) or await self._plan(machines, names)
        self._events.publish(Planned(self.display, self.variants, placed))
        files = await self._files(placed, [machine.address for machine in machines])
        deployment = Deployment(
            self.display,
            self.layout,
            placed,
            self._identity,
            self._events,
            files,
            self._generation,
            self._note,
        )
        self._left.add(self._members.orphans)
        await self._left.release_but(placed.stages, deployment.specs)
        self.deployment = deployment
        self._note(lifecycle.Planned())
        running = asyncio.create_task(deployment.run())
        first = asyncio.create_task(deployment.until_ready())
        drained = asyncio.create_task(deployment.until_drained())
        storing = asyncio.create_task(deployment.timing.keep(self.measure))
        try:
            await asyncio.wait([running, first], return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                self._on_ready(placed)
                self._ready.set()
            await asyncio.wait([running, drained], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                reason = f"machine {deployment.draining} is being drained"
                self._note(lifecycle.Lost(reason, drained=True))
                raise UnavailableError(reason)
            await running
        except asyncio.CancelledError:
            self._note(lifecycle.Stopped())
            raise
        finally:
            tasks = running, first, drained, storing
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._left.add(deployment.left)

    async def _plan(self, machines: list[Machine], names: list[str] | None) -> Plan:
        """The best plan over these machines; `names`: of those that may be used, None for all."""
        fleet = Measurements.load().fleet(machines, self.display, self.variants)
        # A search over many machines takes a second; answers go on meanwhile.
        placed = await asyncio.to_thread(
            plan,
            self.variants,
            fleet.machines,
            self._objective,
            model=self.display,
            nodes=names,
            network=fleet.network,
            alternatives=scaled(quants=self.source.quants or not self.layout.quantized),
        )
        if not self._served:
            return placed
        allowed = [m for m in fleet.machines if names is None or m.name in names]
        return keeping(placed, self._served, self.variants, allowed, fleet.network)

    def _resumed(self, machines: list[Machine]) -> Plan | None:
        """The plan of the coordinator before, once, where its machines are there."""
        resume, self._resume = self._resume, None
        return resume.on(machines) if resume is not None else None

    async def _files(self, placed: Plan, addresses: list[str]) -> Files:
        inspected, draft = self._inspected.by_engine, self._inspected.draft
        revisions = {engine: layout.revision for engine, layout in inspected.items()}
        agents = [stage.machine.address for stage in placed.stages]
        from_hub: list[list[str]] = [[] for _ in placed.stages]
        for engine in placed.engines:
            indices = [i for i, stage in enumerate(placed.stages) if stage.engine == engine]
            assigned = await hub_files(
                self._models[engine].model,
                revisions[engine],
                inspected[engine].files,
                [(placed.stages[i].first, placed.stages[i].end) for i in indices],
                [agents[i] for i in indices],
                addresses,
                self._identity,
                has_lm_head=placed.stages[indices[-1]].has_lm_head,
            )
            for index, files in zip(indices, assigned, strict=True):
                from_hub[index] = files
        sources = [*self._own_sources, *addresses]
        if draft is None:
            return Files(self._models, revisions, sources, from_hub)
        source = self._generation.draft
        (of_draft,) = await hub_files(
            source.model,
            draft.revision,
            draft.files,
            [(0, len(draft.layer_bytes))],
            agents[:1],
            addresses,
            self._identity,
        )
        drafting = Draft(
            model=source.model, quant=source.quant, revision=draft.revision, hub_files=of_draft
        )
        return Files(self._models, revisions, sources, from_hub, drafting)


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
