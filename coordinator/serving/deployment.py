"""A deployment: the stages of one plan loaded on their machines, and the ring kept open."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from coordinator.fleet.head_watch import HeadWatch
from coordinator.fleet.left_stages import LeftStage
from coordinator.fleet.timing import Timing
from coordinator.models.catalog import Source
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout, Plan, Stage
from coordinator.recovery import lifecycle
from coordinator.serving.events import Events
from coordinator.serving.lease import Lease
from unicluster.causes import Cause
from unicluster.cluster.channels import as_error, known_at, without_scope
from unicluster.deadlines import floor_seconds, open_seconds
from unicluster.dialing.dialer import Dialer
from unicluster.errors import StageError, UnavailableError, UniclusterError
from unicluster.retry import attempts, succeeded
from unicluster.stall import within
from unicluster.trust.identity import Credentials
from unicluster.units import format_bytes
from unicluster.v1.chat_pb2 import DescribeChatRequest, HoldRingRequest, SavePrefixesRequest
from unicluster.v1.chat_pb2_grpc import ChatStub, HeadStub
from unicluster.v1.node_pb2 import DescribeNodeRequest, DeviceShare, Draft, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.stage_pb2 import Opened, RouteStop, StageInfo

if TYPE_CHECKING:
    from unicluster.v1.chat_pb2_grpc import ChatAsyncStub, HeadAsyncStub

    RingCall = grpc.aio.UnaryStreamCall[HoldRingRequest, Opened]

log = logging.getLogger(__name__)

# Pauses before a ring is opened again.
FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 1.0
# If it takes longer to open a ring over stages that are ready, something is wrong with them.
OPEN_SECONDS = 15.0
# For writing caches of prompts to disk before the stages end.
SAVE_SECONDS = 15.0
# For the head's model to be set before it says that the ring is open.
SET_FLOORS = 5.0
# Whether an answer can go on elsewhere changes without notice.
LOOK_SECONDS = 1.0
# Losses of a stage, on a machine that is there, after which it may load all the same.
MENDABLE = (Cause.KILLED, Cause.FROZEN)


@dataclass(frozen=True)
class Files:
    """Sources of a model's files: see StageSpec. from_hub: names of files for each stage.

    models, revisions: by the engine that loads them. draft: the model that the head loads beside
    its layers.
    """

    models: Mapping[str, Source]
    revisions: Mapping[str, str]
    sources: list[str]
    from_hub: list[list[str]]
    draft: Draft | None = None


class _RingClosed(Exception):  # noqa: N818 - no error yet: it is opened again
    """The ring ended while all its stages stand."""


def _share(did: str, done: int, total: int) -> str:
    if not done or not total:
        return ""
    percent = min(100 * done // total, 100)
    return f"{did} {format_bytes(done)} of {format_bytes(total)}, {percent} %"


def _for_others(stop: RouteStop) -> RouteStop:
    """A stop as other machines may reach it, whose links have other names than here."""
    return RouteStop(
        node=stop.node,
        address=stop.address,
        addresses=dict.fromkeys(without_scope(address) for address in stop.addresses),
        machine=stop.machine,
    )


def _specs(layout: Layout, plan: Plan, files: Files, generation: StageSpec) -> list[StageSpec]:
    """The spec of each stage: the template with the fields of that stage."""
    deployment = secrets.token_hex(8)
    prefill = [_prefill_seconds(stage, plan) for stage in plan.stages]
    specs = []
    for stage, hub_files, prefill_s in zip(plan.stages, files.from_hub, prefill, strict=True):
        spec = StageSpec()
        spec.CopyFrom(generation)
        spec.MergeFrom(
            StageSpec(
                deployment=deployment,
                model=files.models[stage.engine].model,
                quant=files.models[stage.engine].quant,
                first_layer=stage.first,
                end_layer=stage.end,
                context=layout.context,
                users=layout.users,
                memory=stage.weight_bytes + stage.kv_bytes + stage.reserve_bytes,
                revision=files.revisions[stage.engine],
                sources=files.sources,
                hub_files=hub_files,
                kv_bytes=sum(stage.kv_bytes for stage in plan.stages),
                engine=stage.engine,
                finishes=stage.has_lm_head,
                devices=[
                    DeviceShare(name=share.device, layers=share.layers, memory=share.bytes)
                    for share in stage.shares
                ],
                decode_s=stage.seconds_per_token,
                prefill_s=prefill_s,
                ring_decode_s=plan.seconds_per_token,
                ring_prefill_s=sum(prefill) + plan.hops_s,
            )
        )
        spec.ClearField("draft")  # loaded beside the head's layers only
        if stage.head and files.draft is not None:
            spec.draft.CopyFrom(files.draft)
        specs.append(spec)
    return specs


def _prefill_seconds(stage: Stage, plan: Plan) -> float:
    """Seconds for one token of a prompt; at most that of an answer, where compute is unknown."""
    if stage.chunk_seconds is None or not plan.chunk_tokens:
        return stage.seconds_per_token
    return stage.chunk_seconds / plan.chunk_tokens


class Deployment:
    """Stages as planned, from loading to unloading.

    stages_stay: its stages are left to the next deployment, which adopts those that it has too;
    so it is after a loss, and not when the deployment is ended from outside. left: those, then.
    `report` gets its news: that a ring opened or broke, or that it is lost. `detail` says why it
    does not answer, in a sentence.
    """

    def __init__(
        self,
        display: str,
        layout: Layout,
        plan: Plan,
        identity: Credentials,
        events: Events,
        files: Files,
        generation: StageSpec,
        report: Callable[[lifecycle.Event], object] = lambda news: None,
    ) -> None:
        self.plan = plan
        # By the event loop's clock, the latter of the newest ring.
        self.planned_at = asyncio.get_running_loop().time()
        self.opened_at = 0.0
        self._report = report
        self.timing = Timing(display, plan.stages)
        self.detail = f"loading {display}"
        self.stages: list[StageInfo] = []
        self.chat: ChatAsyncStub | None = None
        self.stages_stay = False
        self.left: list[LeftStage] = []
        self._head: HeadAsyncStub | None = None
        self._identity = identity
        self._dialer = Dialer(identity)
        self._events = events
        self._changed = asyncio.Event()
        self._channels = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._was_ready = asyncio.Event()
        self._stirred = asyncio.Event()
        self._unopened = False  # over stages that are all there: machines don't reach each other
        self._answers: list[Callable[[], bool]] = []
        self.specs = _specs(layout, plan, files, generation)
        self.watch = HeadWatch(self.specs[0].ring_prefill_s, plan.chunk_tokens)
        self._leases: list[Lease] = []

    @property
    def ending(self) -> str:
        """Reason for clients whose answers end because the deployment does."""
        return self.detail or "the model is being unloaded"

    @property
    def loaded(self) -> float:
        """Share of the weights of all stages that are fetched and loaded, 0 to 1."""
        total = sum(stage.weight_bytes for stage in self.plan.stages)
        done = sum(lease.loaded * lease.stage.weight_bytes for lease in self._leases)
        return done / total if total else 0.0

    @property
    def progress(self) -> str:
        """How far its machines are together, as "fetched 1.2 GB of 4.0 GB, 30 %"; or empty.

        Of those that fetch, until all have fetched; then of those that load.
        """
        parts = [lease.progress for lease in self._leases]
        fetching = [part for part in parts if part.fetched < part.to_fetch]
        if fetching:
            wanted = sum(part.to_fetch for part in fetching)
            return _share("fetched", sum(part.fetched for part in fetching), wanted)
        return _share("loaded", sum(p.bytes_done for p in parts), sum(self._to_load()))

    def _to_load(self) -> Iterator[int]:
        """Bytes of weights of each stage: as its machine says, or planned until it has said so."""
        for lease in self._leases:
            yield lease.progress.bytes_total or lease.stage.weight_bytes

    @property
    def head_name(self) -> str:
        return self.plan.stages[0].machine.name

    async def run(self) -> None:
        """Loads, then serves, until a machine is lost: raises the error that names it."""
        async with self._channels:
            try:
                await self._supervise()
            except UniclusterError as error:
                self._report(lifecycle.Lost(str(error), mendable=self._is_mendable(error)))
                raise
            finally:
                self.chat = None
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._let_go()

    async def until_ready(self) -> None:
        """Returns when the model answers for the first time."""
        await self._was_ready.wait()

    def _is_mendable(self, error: UniclusterError) -> bool:
        """Whether another plan, or the same one later, may load although this one did not."""
        lost = next((lease for lease in self._leases if lease.lost is error), None)
        if lost is not None and not isinstance(error, UnavailableError):
            return lost.cause in MENDABLE
        return isinstance(error, UnavailableError) and not self._unopened

    @contextlib.contextmanager
    def answering(self, can_move: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """While the block runs, an answer does: draining waits for its end.

        can_move: whether the answer could go on elsewhere now.
        """
        self._answers.append(can_move)
        try:
            yield
        finally:
            self._answers.remove(can_move)
            self._stirred.set()

    async def until_movable(self, seconds: float, most: float) -> None:
        """Returns when no answer runs, or after `seconds` when all can go on elsewhere.

        Raises UnavailableError when one can't, and still runs after `most` seconds: new ones wait
        meanwhile.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        until = began + seconds
        while self._answers and (clock() < until or not all(can() for can in self._answers)):
            if clock() - began >= max(seconds, most):
                stuck = sum(not can() for can in self._answers)
                answers = "an answer" if stuck == 1 else f"{stuck} answers"
                raise UnavailableError(
                    f"{answers} that can't go on elsewhere still ran after {most:.0f} s"
                )
            self._stirred.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_SECONDS, max(0.0, until - clock()) or 1.0)):
                    await self._stirred.wait()

    @property
    def draining(self) -> str:
        """A machine that asked to be let go of; empty when none did."""
        return next((lease.name for lease in self._leases if lease.draining), "")

    async def until_drained(self) -> None:
        """Returns when a machine wants to be let go of, and no answer runs any more."""
        while not self.draining or self._answers:
            self._stirred.clear()
            await self._stirred.wait()

    async def _supervise(self) -> None:
        for stage, spec in zip(self.plan.stages, self.specs, strict=True):
            channel, agent = await self._connect(stage.machine)
            lease = Lease(stage, spec, channel, agent)
            self._leases.append(lease)
            hold = lease.hold(self._events, self._stir)
            self._tasks.append(asyncio.create_task(hold))
        clock = asyncio.get_running_loop().time
        began: float | None = None
        async for attempt in attempts(
            "ring",
            lambda error: isinstance(error, _RingClosed),
            first=FIRST_RETRY_SECONDS,
            last=LAST_RETRY_SECONDS,
        ):
            with attempt:
                workers = await self._all_ready()
                began = began or clock()
                ring = asyncio.create_task(self._hold_ring(workers))
                try:
                    await self._until_ended(ring)
                    self._raise_if_lost()
                    if ring.result():
                        began = None
                        succeeded(attempt)
                    elif clock() - began > OPEN_SECONDS:
                        self._unopened = True
                        raise UnavailableError(self.detail)
                    raise _RingClosed(self.detail)
                finally:
                    ring.cancel()
                    await asyncio.gather(ring, return_exceptions=True)

    async def _until_ended(self, ring: "asyncio.Task[bool]") -> None:
        """Returns when the ring or a stage ends; cancelled, has prefixes saved before that."""
        try:
            await asyncio.wait([ring, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._save_prefixes()
            raise

    async def _save_prefixes(self) -> None:
        """Has the machines write the caches of prompts to their disks, if they are to."""
        if self._head is None or self.chat is None or not self.specs[0].cache_disk:
            return
        request = SavePrefixesRequest(seconds=SAVE_SECONDS)
        try:
            await self._head.SavePrefixes(request, timeout=SAVE_SECONDS + floor_seconds())
        except grpc.aio.AioRpcError as error:
            log.warning(
                "prompt caches were not saved: %s", as_error(error, f"machine {self.head_name}")
            )

    def _stir(self) -> None:
        self._changed.set()
        self._stirred.set()

    async def _let_go(self) -> None:
        """Waits, for a while, until what comes next finds the stages, or their memory, free."""
        ends = (self._end(*pair) for pair in zip(self._leases, self.specs, strict=False))
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(error, UnavailableError):
                log.warning("%s; going on", error)
            elif error is not None:
                raise error

    async def _end(self, lease: Lease, spec: StageSpec) -> None:
        """Ends or leaves a stage. One whose machine has gone is left: it may come back with it."""
        gone = lease.lost is not None and not lease.faulty
        stays = self.stages_stay and not (lease.faulty or lease.draining)
        if spec.orphan_grace_s and (gone or stays):
            self.left.append(LeftStage(lease.stage.machine, spec, gone))
        elif spec.orphan_grace_s:
            await lease.release()
        await lease.until_left()

    async def _all_ready(self) -> list[RouteStop]:
        while True:
            self._changed.clear()
            self._raise_if_lost()
            workers = [lease.worker for lease in self._leases if lease.worker is not None]
            if len(workers) == len(self._leases):
                return workers
            await self._changed.wait()

    def _raise_if_lost(self) -> None:
        for lease in self._leases:
            if lease.lost is not None:
                self._lose(str(lease.lost))
                raise lease.lost

    async def _hold_ring(self, workers: list[RouteStop]) -> bool:
        """Returns when the ring breaks: whether it was ever open. `detail` says why."""
        head, *others = workers
        route = [_for_others(stop) for stop in others]
        was_open = False
        try:
            connected, at = await self._dialer.connect_stop(head)
        except UniclusterError as error:
            self._lose(str(error))
            log.warning("%s", error)
            return False
        async with connected as channel, known_at(at.address, self._identity, _describe_chat):
            ring = HeadStub(channel).HoldRing(
                HoldRingRequest(
                    route=route,
                    decode_s=self.specs[0].ring_decode_s,
                    prefill_s=self.specs[0].ring_prefill_s,
                )
            )
            chat, self._head = ChatStub(channel), HeadStub(channel)
            stuck = asyncio.create_task(self.watch.until_stuck(chat, self._leases[0].long_name))
            try:
                opened = await self._opened(stuck, ring)
                while isinstance(opened, Opened):
                    if opened.stages:
                        opened.stages[0].address = at.address
                    self._open(opened, chat)
                    was_open = True
                    opened = await _unless_stuck(stuck, ring)
                reason = f"machine {self.head_name} closed the ring"
            except grpc.aio.AioRpcError as error:
                reason = str(as_error(error, f"machine {self.head_name} (head)"))
            except StageError as error:  # only a new worker can be of help
                self._leases[0].faulty = True
                self._lose(str(error))
                raise
            finally:
                stuck.cancel()
            # Before the channel is closed, and with it the answers that run.
            self._lose(reason)
            log.warning("%s", reason)
        return was_open

    async def _opened(self, stuck: "asyncio.Task[str]", ring: "RingCall") -> object:
        """The first message of the stream that holds the ring; StageError if it is late."""
        seconds = open_seconds(len(self._leases)) + SET_FLOORS * floor_seconds()
        try:
            return await within(seconds, _unless_stuck(stuck, ring))
        except TimeoutError:
            who = self._leases[0].long_name
            raise StageError(f"{who} did not open the ring within {seconds:.0f} s") from None

    def _lose(self, reason: str) -> None:
        self.chat = self._head = None
        self.detail = reason
        self._report(lifecycle.Broke(reason))

    def _open(self, opened: Opened, chat: "ChatAsyncStub") -> None:
        self.stages = list(opened.stages)
        self.chat, self.opened_at = chat, asyncio.get_running_loop().time()
        self.detail = ""
        self._was_ready.set()
        self._report(lifecycle.Opened())

    async def _connect(self, machine: Machine) -> tuple[grpc.aio.Channel, str]:
        """A channel to a machine's agent, and the address that it is at."""
        reached = await self._dialer.reach(
            machine.addresses or [machine.address],
            f"machine {machine.name}",
            name=machine.name,
            machine=machine.id,
        )
        channel = self._dialer.connect(reached)
        await self._channels.enter_async_context(
            known_at(reached.address, self._identity, _describe)
        )
        return await self._channels.enter_async_context(channel), reached.address


async def _read(ring: "RingCall") -> object:
    return await ring.read()


async def _unless_stuck(stuck: "asyncio.Task[str]", ring: "RingCall") -> object:
    """The ring's next message. Raises StageError once its head is stuck."""
    reading = asyncio.create_task(_read(ring))
    try:
        await asyncio.wait([reading, stuck], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise StageError(stuck.result())
        return reading.result()
    finally:
        reading.cancel()


async def _describe(channel: grpc.aio.Channel) -> None:
    await NodeStub(channel).Describe(DescribeNodeRequest())


async def _describe_chat(channel: grpc.aio.Channel) -> None:
    await ChatStub(channel).Describe(DescribeChatRequest())
