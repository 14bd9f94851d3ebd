"""The machine's agent: describes the machine, and runs stages for coordinators."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
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
from node.agent.restarts import Restarts
from node.weights import hub
from node.weights.fetch import describe
from node.weights.sources import Sources
from node.worker.config import WorkerConfig
from node.worker.process import REASON_CHARS, WorkerProcess
from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__
from unicluster.checkpoints.checkpoint import Manifest
from unicluster.checkpoints.inspecting import inspect
from unicluster.cluster.abort import abort
from unicluster.cluster.background import going_on
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
    shortened,
    shown,
)
from unicluster.trust.cluster import Cluster
from unicluster.trust.keyring import Keyring
from unicluster.trust.role import audit
from unicluster.trust.store import Store
from unicluster.units import format_bytes
from unicluster.v1.node_pb2 import (
    DescribeNodeRequest,
    Draining,
    DrainRequest,
    Greeting,
    InspectRequest,
    LoadProgress,
    ModelLayout,
    NodeInfo,
    Rotated,
    Rotation,
    StageEvent,
    StageExit,
    StageReady,
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


class Agent(NodeServicer):
    """Runs each stage as a child process for as long as its stream lives."""

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
    ) -> None:
        self.peers = peers
        self._identity = identity
        self._host = host
        self._port = port
        self._stage_port = stage_port
        self._ledger = Ledger(hardware, memory_cap)
        self._quiet = QuietMeasuring()
        self._stages: dict[int, StageSpec] = {}
        self.computed_tokens = 0  # of prompts and answers, by all stages that ran here
        self._inspections = Inspections()
        self._drain = asyncio.Event()
        self._changed = asyncio.Event()

    def addresses(self) -> list[str]:
        """Where other machines may reach this agent now, the best first."""
        only = one_address(self._host)
        hosts = [only] if only else own_addresses()
        return [join_address(host.partition("%")[0], self._port) for host in hosts][:MOST_ADDRESSES]

    @property
    def stages(self) -> list[StageSpec]:
        """Specs of the stages that run now."""
        return list(self._stages.values())

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

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

    def offers(self) -> list[tuple[Device, int]]:
        """Bytes that new stages may take now of each device; may run a command to find out."""
        if self._drain.is_set():
            return [(device, 0) for device in self.hardware.devices]
        return self._ledger.usable(self.stages)

    async def Describe(  # noqa: N802
        self, request: DescribeNodeRequest, context: Context
    ) -> NodeInfo:
        if request.unless_deployment:
            await self._until_ended(request.unless_deployment)
        hardware = self.hardware
        offers = await asyncio.to_thread(self.offers)
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
            stages=self._stages.values(),
            peers=[each.addresses[0] for each in known],
            known=known,
            addresses=self.addresses(),
            draining=self._drain.is_set(),
            oldest_protocol=OLDEST_PROTOCOL,
            clock=time.time(),
            engines=hardware.engines,
            ggml_backend=hardware.ggml_backend,
            ggml_bandwidth=hardware.ggml_bandwidth,
            devices=[as_proto(device, usable) for device, usable in offers],
        )

    async def _until_ended(self, deployment: str) -> None:
        """Returns when no stage of a deployment runs here any more, or after ENDED_SECONDS."""
        clock = asyncio.get_running_loop().time
        until = clock() + ENDED_SECONDS
        while clock() < until and any(s.deployment == deployment for s in self.stages):
            await self.changed(until - clock())

    async def Drain(self, request: DrainRequest, context: Context) -> NodeInfo:  # noqa: N802
        if request.off:
            self._drain.clear()
        else:
            self._drain.set()
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
            check_stage(request, len(self._stages))
            self._ledger.check(request, self.stages)
        except UniclusterError as error:
            audit.warning("refused a stage to %s: %s", peer_name(context), error)
            await abort(context, error)
        audit.info(
            "stage: layers %d-%d of %s (%s) for %s",
            request.first_layer,
            request.end_layer - 1,
            request.model,
            format_bytes(request.memory),
            peer_name(context),
        )
        key = id(request)
        # A second model on the same machine takes any free port beside the known one.
        port = 0 if self._stages else self._stage_port
        self._stages[key] = request
        self._changed.set()
        writing = asyncio.Lock()  # one message at a time, from whichever of the two
        reporting = asyncio.create_task(self._report_draining(context, writing))
        addresses, vouching = _dialled(request.sources, context)
        config = WorkerConfig(
            spec=request,
            node=self._identity.name,
            host=self._host,
            port=port,
            identity=self._identity.current.to_dict(),
            sources=addresses,
            vouching=vouching,
            elsewhere=self.peers.elsewhere(addresses),
        )
        try:
            async with contextlib.aclosing(self._run(config)) as events:
                async for event in events:
                    async with writing:
                        await context.write(event)
        finally:
            reporting.cancel()
            del self._stages[key]
            self._changed.set()
            log.info("stage ended: layers %d-%d", request.first_layer, request.end_layer - 1)

    async def _report_draining(self, context: Context, writing: asyncio.Lock) -> None:
        await self._drain.wait()
        async with writing:
            await context.write(StageEvent(draining=Draining()))

    async def _run(self, config: WorkerConfig) -> AsyncGenerator[StageEvent]:
        spec = config.spec
        environment = self._ledger.parts(spec)[0].device.environment
        restarts = Restarts()
        while True:
            ready, began = False, time.monotonic()
            fresh = replace(config, identity=self._identity.current.to_dict())
            worker = await WorkerProcess.start(fresh, extra=environment)
            renewing = asyncio.create_task(self._renew(worker))
            try:
                async for event in worker.events():
                    ready = ready or event["event"] == "ready"
                    if event["event"] == "tokens":
                        self.computed_tokens += event["more"]
                    if (progress := _stage_event(event)) is not None:
                        yield progress
                ended = await worker.exit()
            finally:
                renewing.cancel()
                # The coordinator may have gone in the middle: the worker must not stay.
                await asyncio.shield(worker.stop())
            pause = restarts.after(began, time.monotonic(), ready=ready)
            log.warning(
                "worker for layers %d-%d: %s%s",
                spec.first_layer,
                spec.end_layer - 1,
                ended.reason,
                "" if pause is None else f"; starting it again in {pause:.2g} s",
            )
            yield StageEvent(
                exit=StageExit(
                    reason=shortened(ended.reason, REASON_CHARS),
                    stderr_tail=ended.stderr_tail,
                    out_of_memory=ended.out_of_memory,
                    restarting=pause is not None,
                )
            )
            if pause is None:
                return
            await asyncio.sleep(pause)

    async def _renew(self, worker: WorkerProcess) -> None:
        """Hands a worker new certificates before its old ones expire."""
        while True:
            with going_on("renewing a worker's certificate"):
                async for identity in self._identity.renewals():
                    worker.renew(identity.to_dict())
            await asyncio.sleep(RENEW_SECONDS)

    def in_flight(self, model: str, revision: str) -> set[str]:
        """Files of a model that stages here are fetching from the hub."""
        fetching = [part for spec in self._stages.values() for part in (spec, spec.draft)]
        matching = [part for part in fetching if (part.model, part.revision) == (model, revision)]
        return {name for part in matching for name in part.hub_files}


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


def _stage_event(event: dict[str, Any]) -> StageEvent | None:
    """A worker's event as the coordinator gets it, if it is for the coordinator."""
    if event["event"] == "progress":
        return StageEvent(
            progress=LoadProgress(
                layers_done=event["layers"],
                layers_total=event["layers_total"],
                bytes_done=event["bytes"],
                bytes_total=event["bytes_total"],
            )
        )
    if event["event"] == "fetching":
        return StageEvent(
            progress=LoadProgress(fetched=event["fetched"], to_fetch=event["to_fetch"])
        )
    if event["event"] == "ready":
        return StageEvent(ready=StageReady(port=event["port"], weight_bytes=event["weight_bytes"]))
    return None
