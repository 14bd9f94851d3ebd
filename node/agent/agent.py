"""The machine's agent: describes the machine, and runs stages for coordinators."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import grpc
import psutil

from node.agent.admission import Inspections, check_inspect, check_stage, check_try_hub
from node.agent.devices import Device
from node.agent.ledger import Ledger, as_proto
from node.agent.peers import Peers
from node.agent.probe import Hardware
from node.agent.quiet import QuietMeasuring
from node.power.clocks import Sleep
from node.supervision.running import RunningStage, keep_renewed
from node.supervision.spare import SpareWorker
from node.weights import hub
from node.weights.fetch import describe
from node.weights.sources import Sources
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__, failpoints
from unicluster.checkpoints.checkpoint import Manifest
from unicluster.checkpoints.inspecting import inspect
from unicluster.cluster.abort import abort
from unicluster.cluster.channels import host_of, join_address, peer_name, without_scope
from unicluster.cluster.discovery import one_address
from unicluster.cluster.interfaces import own_addresses
from unicluster.cluster.records import MOST_ADDRESSES
from unicluster.cluster.roles import caller_of
from unicluster.cluster.versions import mismatch
from unicluster.dialing.greetings import parse_greeting
from unicluster.errors import (
    InputError,
    TrustError,
    UnavailableError,
    UniclusterError,
    shown,
)
from unicluster.trust.cluster import Cluster
from unicluster.trust.keyring import Keyring
from unicluster.trust.role import audit
from unicluster.trust.store import Store
from unicluster.units import format_bytes
from unicluster.v1.node_pb2 import (
    DRAIN_ORDERS_GIVEN,
    DRAIN_ORDERS_NONE,
    DescribeNodeRequest,
    Draining,
    DrainRequest,
    GoingToSleep,
    Greeting,
    InspectRequest,
    ModelLayout,
    NodeInfo,
    Released,
    ReleaseRequest,
    Rotated,
    Rotation,
    StageEvent,
    StageSpec,
    TryHubReply,
    TryHubRequest,
)
from unicluster.v1.node_pb2_grpc import NodeServicer

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Run as a process of its own, because the agent never imports MLX.
INSPECT = "node.inspect"
# Until certificates are looked after again, after an error.
RENEW_SECONDS = 60.0
# A question that waits for the end of a stage is answered within this: a worker gets 5 s to end.
ENDED_SECONDS = 6.0
# Between two looks at whether coordinators have let go before the machine sleeps.
SLEEP_LOOK_SECONDS = 0.5


class Agent(NodeServicer):
    """Runs each stage as a child process for as long as its stream lives, or its grace lasts."""

    def __init__(
        self,
        identity: Keyring,
        hardware: Hardware,
        peers: Peers,
        *,
        host: str,
        port: int,
        stage_port: int,
        memory_cap: int | None,
        cache_dir: str = "",
        spare: bool = False,
    ) -> None:
        """cache_dir: where stages may keep prompt caches on disk; empty: nowhere.

        spare: whether a worker waits for the next stage, or for the place of one that is lost.
        """
        self._cache_dir = cache_dir
        self.peers = peers
        self._identity = identity
        self._host = host
        self._port = port
        self._stage_port = stage_port
        self._ledger = Ledger(hardware, memory_cap)
        self._quiet = QuietMeasuring()
        self._stages: list[RunningStage] = []
        self._workers = SpareWorker(lambda: any(s.is_loading for s in self._stages), enabled=spare)
        self.computed_tokens = 0  # of prompts and answers, by all stages that ran here
        self._inspections = Inspections()
        self._drain = asyncio.Event()
        self._drain_orders = DRAIN_ORDERS_NONE
        self._sleep = Sleep()
        self._falls_asleep = False
        self._followed: dict[Context, asyncio.Lock] = {}  # streams of stages that coordinators read
        self._changed = asyncio.Event()

    def addresses(self) -> list[str]:
        """Where other machines may reach this agent now, the best first."""
        only = one_address(self._host)
        hosts = [only] if only else own_addresses()
        return [join_address(host.partition("%")[0], self._port) for host in hosts][:MOST_ADDRESSES]

    @property
    def stages(self) -> list[StageSpec]:
        """Specs of the stages that run now."""
        return [stage.spec for stage in self._stages]

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

    @property
    def keeps_awake(self) -> bool:
        """Whether it has a stage for which the machine is not to fall asleep by itself."""
        return any(not stage.is_orphaned for stage in list(self._stages))

    async def sleeps(self, asleep: bool) -> None:
        """The machine is about to sleep: returns when no coordinator holds a stage here any more.

        Until it is awake (`asleep` is False) it has nothing to offer.
        """
        if asleep != self._falls_asleep:
            log.warning("this machine %s", "goes to sleep" if asleep else "is awake")
        self._falls_asleep = asleep
        self._changed.set()
        if asleep:
            writes = (_write_sleep(*pair) for pair in self._followed.items())
            await asyncio.gather(*writes, return_exceptions=True)  # who has gone needs no word
        while self._falls_asleep and self._followed:
            await self.changed(SLEEP_LOOK_SECONDS)

    async def changed(self, timeout: float) -> None:
        """Returns when a stage came or went, or draining began or ended; at the latest after
        `timeout` seconds."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, timeout))

    @property
    def hardware(self) -> Hardware:
        """This machine, as it was last measured."""
        return self._ledger.hardware

    def measure_if_quiet(self) -> None:
        """Measures the bandwidth again, once in a while when nobody uses the machine. Blocks."""
        busy = psutil.cpu_percent()  # since this was called before
        stages = bool(self._stages)
        if self._quiet.due(self.hardware, time.monotonic(), busy, stages=stages):
            self._ledger.hardware = self._quiet.measured(self.hardware)

    def usable_memory(self) -> int:
        """Bytes that a new stage may take now, of the engine that reaches most.

        May run a command to find out.
        """
        return max(_by_engine(self.offers()).values(), default=0)

    def offers(self, without: str = "") -> list[tuple[Device, int]]:
        """Bytes that new stages may take now of each device; may run a command to find out.

        without: a service whose stages are to be replaced.
        """
        if self._drain.is_set() or self._falls_asleep:
            return [(device, 0) for device in self.hardware.devices]
        leaving = [stage for stage in self._stages if without and stage.spec.service == without]
        staying = [stage.spec for stage in self._stages if stage not in leaving]
        freed = [(stage.spec, stage.loaded_bytes) for stage in leaving]
        return self._ledger.usable(staying, freed)

    async def Describe(  # noqa: N802
        self, request: DescribeNodeRequest, context: Context
    ) -> NodeInfo:
        if request.unless_deployment:
            await self._until_ended(request.unless_deployment)
        hardware = self.hardware
        offers = await asyncio.to_thread(self.offers, request.without_service)
        known = self.peers.known()
        return NodeInfo(
            name=self._identity.name,
            chip=hardware.chip,
            backend=hardware.backend,
            version=__version__,
            protocol=PROTOCOL,
            total_memory=hardware.total_memory,
            # Older coordinators take it for every engine's.
            usable_memory=min(_by_engine(offers).values(), default=0),
            bandwidth=hardware.bandwidth,
            bandwidth_measured=hardware.bandwidth_measured,
            platform=hardware.platform,
            stages=self.stages,
            orphaned=[s.spec.deployment for s in self._stages if s.is_orphaned],
            peers=[each.addresses[0] for each in known],
            known=known,
            addresses=self.addresses(),
            draining=self._drain.is_set(),
            drain_orders=self._drain_orders,
            slept_s=self._sleep.seconds,
            oldest_protocol=OLDEST_PROTOCOL,
            clock=time.time(),
            engines=hardware.engines,
            ggml_backend=hardware.ggml_backend,
            ggml_bandwidth=hardware.ggml_bandwidth,
            devices=[as_proto(device, usable) for device, usable in offers],
        )

    async def _until_ended(self, deployment: str) -> None:
        """Returns when no stage of a deployment is held any more, or after ENDED_SECONDS."""
        clock = asyncio.get_running_loop().time
        until = clock() + ENDED_SECONDS
        while clock() < until and any(
            s.spec.deployment == deployment and not s.is_orphaned for s in self._stages
        ):
            await self.changed(until - clock())

    async def Drain(self, request: DrainRequest, context: Context) -> NodeInfo:  # noqa: N802
        self._drain_orders = DRAIN_ORDERS_GIVEN
        if request.off:
            self._drain.clear()
        else:
            self._drain.set()
            await self._end([stage for stage in self._stages if stage.is_orphaned])
        self._changed.set()
        audit.info("draining%s, asked by %s", " ends" if request.off else "", peer_name(context))
        return await self.Describe(DescribeNodeRequest(), context)

    async def Rotate(self, request: Rotation, context: Context) -> Rotated:  # noqa: N802
        store = Store()
        try:
            if request.token:
                store.rotate(Cluster.from_token(request.token))
            if request.finish:
                store.finish_rotation()
            trusted = [cluster.fingerprint for cluster in store.generations()]
        except TrustError as error:
            await abort(context, error)
        if request.token or request.finish:
            audit.info("token rotated, asked by %s: %s", peer_name(context), ", ".join(trusted))
        return Rotated(clusters=trusted)

    async def Greet(self, request: Greeting, context: Context) -> Greeting:  # noqa: N802
        name, machine = caller_of(context)
        mine = self._identity.current
        try:
            said = parse_greeting(request, name, host_of(context))
            # An agent may greet itself: a fleet is often given one list of peers.
            if name == mine.name and machine != mine.machine:
                raise InputError(
                    f"a machine named {name} is already in this cluster at "
                    f"{self.addresses()[0]}, and another one calls from {said.addresses[0]}: "
                    "choose another --name"
                )
            self.peers.note(name, machine, said.addresses)
        except UniclusterError as error:
            audit.warning("refused %s: %s", shown(peer_name(context)), error)
            await abort(context, error)
        if said.protocol and (
            wrong := mismatch(f"machine {name}", said.version, said.protocol, said.oldest)
        ):
            log.warning("%s", wrong)
        return Greeting(version=__version__, protocol=PROTOCOL, oldest_protocol=OLDEST_PROTOCOL)

    async def Inspect(self, request: InspectRequest, context: Context) -> ModelLayout:  # noqa: N802
        if self.hardware.backend == "none":
            reason = f"machine {self._identity.name} has no MLX: on it, {how_to_get_mlx()}"
            await abort(context, UnavailableError(reason))
        try:
            check_inspect(request)
            with self._inspections.admitted():
                here = request
                if not request.config_json:
                    here = await self._described(request, context)
                async with self._inspections.child():
                    return await inspect(INSPECT, here)
        except UniclusterError as error:
            return await abort(context, error)

    async def _described(self, request: InspectRequest, context: Context) -> InspectRequest:
        """The request for files that are on this machine by then."""
        addresses, vouching = _dialled(request.sources, context)
        elsewhere = self.peers.elsewhere(addresses)
        async with Sources(addresses, self._identity, vouching, elsewhere) as sources:
            checkpoint = await describe(request.model, request.revision, sources)
            if request.drafts_for:
                await describe(request.drafts_for, request.drafts_for_revision, sources)
        return _here(request, checkpoint.manifest)

    async def TryHub(self, request: TryHubRequest, context: Context) -> TryHubReply:  # noqa: N802
        try:
            check_try_hub(request)
            await asyncio.to_thread(hub.check, request.model, request.revision)
        except UniclusterError as error:
            await abort(context, error)
        return TryHubReply()

    # Not a generator: gRPC closes one that is cancelled while it yields only when it is collected.
    async def RunStage(self, request: StageSpec, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        try:
            adopted = next((s for s in self._stages if s.can_be(request)), None)
            if adopted is None:
                await self._end(self._replaced_by(request))
            others = [stage.spec for stage in self._stages if stage is not adopted]
            check_stage(request, len(others))
            self._ledger.check(request, others)
        except UniclusterError as error:
            audit.warning("refused a stage to %s: %s", peer_name(context), error)
            await abort(context, error)
        audit.info(
            "stage%s: layers %d-%d of %s (%s) for %s",
            "" if adopted is None else " adopted",
            request.first_layer,
            request.end_layer - 1,
            request.model,
            format_bytes(request.memory),
            peer_name(context),
        )
        if adopted is None:
            # A second model on the same machine takes any free port beside the known one.
            port = 0 if self._stages else self._stage_port
            stage = self._begin(self._config(request, port, context))
            follower = stage.follow()
        else:
            stage = adopted
            follower = stage.follow(self._config(request, stage.port, context))
        self._changed.set()
        # One message at a time, from whoever writes.
        writing = self._followed[context] = asyncio.Lock()
        reporting = asyncio.create_task(self._report_draining(context, writing))
        try:
            if adopted is not None:
                await failpoints.reach_async("agent.adopted")
            async for event in follower.events():
                async with writing:
                    await context.write(event)
        finally:
            reporting.cancel()
            del self._followed[context]
            await stage.leave(follower)
            self._changed.set()

    async def Release(self, request: ReleaseRequest, context: Context) -> Released:  # noqa: N802
        named = [s for s in self._stages if s.spec.deployment == request.deployment]
        if named:
            audit.info("released by %s: %d stages", peer_name(context), len(named))
        await self._end(named)
        return Released(stages=len(named))

    def prepare(self) -> None:
        """Starts a spare worker soon, if there is to be one; on the event loop."""
        self._workers.renew({})

    async def close(self) -> None:
        """Ends all stages, and the spare worker."""
        await asyncio.gather(self._end(self._stages), self._workers.close())

    def _begin(self, config: WorkerConfig) -> RunningStage:
        environment = self._ledger.parts(config.spec)[0].device.environment

        async def start(current: WorkerConfig) -> WorkerProcess:
            fresh = replace(current, identity=self._identity.current.to_dict())
            return await self._workers.start(fresh, environment)

        def ended(stage: RunningStage) -> None:
            self._stages.remove(stage)
            self._changed.set()
            spec = stage.spec
            log.info("stage ended: layers %d-%d", spec.first_layer, spec.end_layer - 1)

        def count(tokens: int) -> None:
            self.computed_tokens += tokens

        stage = RunningStage(config, start, self._renew, count, ended)
        self._stages.append(stage)
        return stage

    def _replaced_by(self, spec: StageSpec) -> list[RunningStage]:
        """Stages of the same service that nobody will adopt once it has another one here."""
        left = [stage for stage in self._stages if stage.is_left_for(spec)]
        return [s for s in left if spec.service and s.spec.service == spec.service]

    async def _end(self, stages: Iterable[RunningStage]) -> None:
        await asyncio.gather(*(stage.stop() for stage in list(stages)))

    def _config(self, spec: StageSpec, port: int, context: Context) -> WorkerConfig:
        addresses, vouching = _dialled(spec.sources, context)
        return WorkerConfig(
            spec=spec,
            node=self._identity.name,
            host=self._host,
            port=port,
            identity=self._identity.current.to_dict(),
            sources=addresses,
            vouching=vouching,
            elsewhere=self.peers.elsewhere(addresses),
            cache_dir=self._cache_dir,
        )

    async def _report_draining(self, context: Context, writing: asyncio.Lock) -> None:
        await self._drain.wait()
        async with writing:
            await context.write(StageEvent(draining=Draining()))

    async def _renew(self, worker: WorkerProcess) -> None:
        await keep_renewed(worker, self._identity.renewals, RENEW_SECONDS)

    def in_flight(self, model: str, revision: str) -> set[str]:
        """Files of a model that stages here are fetching from the hub."""
        fetching = [part for spec in self.stages for part in (spec, spec.draft)]
        matching = [part for part in fetching if (part.model, part.revision) == (model, revision)]
        return {name for part in matching for name in part.hub_files}


async def _write_sleep(context: Context, writing: asyncio.Lock) -> None:
    async with writing:
        await context.write(StageEvent(going_to_sleep=GoingToSleep()))


def _by_engine(offers: Iterable[tuple[Device, int]]) -> Counter[str]:
    """Bytes by engine."""
    sizes: Counter[str] = Counter()
    for device, usable in offers:
        sizes[device.engine] += usable
    return sizes


def how_to_get_mlx() -> str:
    """How to install MLX on this machine, in a phrase."""
    extra = "cuda" if shutil.which("nvidia-smi") else "cpu"
    return f"pip install 'unicluster[{extra}]', then join again"


def _dialled(sources: Iterable[str], context: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Addresses as this machine dials them, ":port" at the caller's own; and the latter alone.

    The caller vouches for the files that it offers itself.
    """
    host = host_of(context)
    dialled = {
        s: join_address(host, int(s[1:])) if s.startswith(":") else without_scope(s)
        for s in sources
    }
    return tuple(dialled.values()), tuple(dialled[s] for s in dialled if s.startswith(":"))


def _here(request: InspectRequest, manifest: Manifest) -> InspectRequest:
    """A request for the files of `manifest`, which are on this machine."""
    here = InspectRequest()
    here.CopyFrom(request)
    here.model, here.revision = manifest.model, manifest.revision
    here.ClearField("sources")
    return here
