"""A lease: one stage on one machine, for as long as its stream lives."""

import asyncio
import logging
from collections.abc import Callable

import grpc

from coordinator.planning.placement import Stage
from coordinator.serving.events import (
    Events,
    Progress,
    StageAdopted,
    StageFailed,
    StageReady,
    WorkerEnded,
)
from unicluster import failpoints
from unicluster.causes import Cause
from unicluster.cluster.channels import as_error, join_address, split_address
from unicluster.deadlines import LOAD, Work, WorkDeadlines, floor_seconds, next_bytes
from unicluster.errors import (
    StageError,
    UnavailableError,
    UniclusterError,
    in_one_line,
    printable,
    shortened,
)
from unicluster.stall import within
from unicluster.v1.node_pb2 import (
    DescribeNodeRequest,
    LoadProgress,
    ReleaseRequest,
    StageEvent,
    StageExit,
    StageSpec,
)
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.stage_pb2 import RouteStop

log = logging.getLogger(__name__)

# A worker is given 5 s to end before it is killed.
UNLOAD_SECONDS = 7.0
# Between two questions to a machine that answers before its stage has ended.
LOOK_SECONDS = 0.5
# The agent watches its worker, and starts it again, sooner than the coordinator gives it up.
PATIENCE_FLOORS = 2.0
REASON_CHARS = 500
CAUSE_CHARS = 40


class Lease:
    """One stage on one machine.

    worker: where its worker is, None unless that is ready. lost: the error that ended the lease.
    cause: a word of Cause for that, or a newer agent's. adopted: it had loaded before.
    faulty: its worker must not be adopted.
    """

    def __init__(
        self, stage: Stage, spec: StageSpec, channel: grpc.aio.Channel, agent: str
    ) -> None:
        """agent: the address at which the machine's agent was reached."""
        self.stage = stage
        self.worker: RouteStop | None = None
        self.lost: UniclusterError | None = None
        self.cause = ""
        self.draining = False
        self.adopted = False
        self.faulty = False
        self._spec = spec
        self._agent = agent
        self._node = NodeStub(channel)
        self._progress = LoadProgress()
        self._deadlines = WorkDeadlines()

    @property
    def name(self) -> str:
        return self.stage.machine.name

    @property
    def long_name(self) -> str:
        """ "machine bob (layers 10 to 19)"."""
        return f"machine {self.name} (layers {self.stage.first} to {self.stage.end - 1})"

    @property
    def loaded(self) -> float:
        """Share of the stage's weights that are fetched and loaded, 0 to 1."""
        if self.worker is not None:
            return 1.0
        done = self._progress.bytes_done + self._progress.fetched
        total = self._progress.bytes_total + self._progress.to_fetch
        return min(done / total, 1.0) if total else 0.0

    @property
    def progress(self) -> LoadProgress:
        """How far its worker is with fetching and loading; a ready one has loaded all."""
        return self._progress

    async def hold(self, events: Events, changed: Callable[[], None]) -> None:
        """Follows the stage until it is lost."""
        who = f"machine {self.name} ({self._agent})"
        call = self._node.RunStage(self._spec)
        try:
            while isinstance(event := await self._next(call), StageEvent):
                if event.HasField("adopted"):
                    await failpoints.reach_async("serve.adopted")
                self._note(event, events)
                changed()
                if event.HasField("going_to_sleep"):
                    break  # it waits until it is let go of
            if self.lost is None:
                self._lose(UnavailableError(f"machine {self.name} ended its stage"), Cause.LEFT)
        except grpc.aio.AioRpcError as error:
            is_silent = "stopped answering" in str(lost := as_error(error, who))
            self._lose(lost, Cause.UNREACHABLE if is_silent else Cause.LEFT)
        except StageError as error:
            self._lose(error, Cause.FROZEN)
            self.faulty = True
        except Exception as error:  # whoever waits for the stage must not wait for ever
            log.exception("%s", self.long_name)
            kind = type(error).__name__
            reason = f"{self.long_name}: {kind}: {in_one_line(error)}"
            self._lose(StageError(reason), Cause.FAILED)
        finally:
            call.cancel()
        self.worker = None
        events.publish(StageFailed(self.name, str(self.lost), self.cause))
        changed()

    def _lose(self, error: UniclusterError, cause: str) -> None:
        self.lost, self.cause = error, cause

    async def release(self) -> None:
        """Ends the stage on its machine, which would keep it for its grace else; as `until_left`.

        An older machine knows no grace: there the end of the stream has ended the stage.
        """
        try:
            request = ReleaseRequest(deployment=self._spec.deployment)
            await self._node.Release(request, timeout=UNLOAD_SECONDS)
        except grpc.aio.AioRpcError as error:
            if _is_late(error):
                raise self._late() from None

    def _late(self) -> UnavailableError:
        return UnavailableError(
            f"{self.long_name} has not unloaded its stage within {UNLOAD_SECONDS:.0f} s"
        )

    async def until_left(self) -> None:
        """Returns when the machine, if it is still there, knows that nobody holds the stage.

        By then its memory is free, or another deployment can adopt it. Raises UnavailableError
        naming the machine when that takes too long.
        """
        request = DescribeNodeRequest(unless_deployment=self._spec.deployment)
        try:
            async with asyncio.timeout(UNLOAD_SECONDS):
                while self.lost is None:
                    info = await self._node.Describe(request, timeout=UNLOAD_SECONDS)
                    if self._spec not in info.stages or self._spec.deployment in info.orphaned:
                        return
                    await asyncio.sleep(LOOK_SECONDS)
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            if isinstance(error, TimeoutError) or _is_late(error):
                raise self._late() from None
            # Else it has gone, and the stage with it.

    async def _next(self, call: grpc.aio.UnaryStreamCall[StageSpec, StageEvent]) -> object:
        """The stage's next event; while it loads, StageError when none comes for too long."""
        if self.worker is not None or self.lost is not None:
            return await call.read()
        work = Work(LOAD, next_bytes(self._progress, self._spec.memory))
        seconds = self._deadlines.limit(work) + PATIENCE_FLOORS * floor_seconds()
        try:
            return await within(seconds, _read(call))
        except TimeoutError:
            progress = self._progress
            did = "fetched" if progress.fetched < progress.to_fetch else "loaded"
            reason = f"{self.long_name} has {did} nothing for {seconds:.0f} s"
            raise StageError(reason) from None

    def _note(self, event: StageEvent, events: Events) -> None:
        if event.HasField("progress"):
            self._progress = event.progress
            events.publish(Progress(self.name, event.progress))
        elif event.HasField("ready"):
            self.worker = self._worker_at(event.ready.port)
            weights = event.ready.weight_bytes
            self._progress = LoadProgress(bytes_done=weights, bytes_total=weights)
            events.publish(StageReady(self.name))
        elif event.HasField("draining"):
            self.draining = True
        elif event.HasField("going_to_sleep"):
            self._lose(UnavailableError(f"machine {self.name} goes to sleep"), Cause.ASLEEP)
        elif event.HasField("adopted"):
            self.adopted = True
            events.publish(StageAdopted(self.name))
        else:
            self._ended(event.exit, events)

    def _worker_at(self, port: int) -> RouteStop:
        """The worker, wherever its machine may be: other machines may reach it elsewhere."""
        known = [self._agent, *self.stage.machine.addresses]
        hosts = dict.fromkeys(split_address(address)[0] for address in known)
        addresses = [join_address(host, port) for host in hosts]
        return RouteStop(
            node=self.name,
            address=addresses[0],
            addresses=addresses,
            machine=self.stage.machine.id,
        )

    def _ended(self, ended: StageExit, events: Events) -> None:
        self.worker, self._progress = None, LoadProgress()
        reason = shortened(printable(ended.reason), REASON_CHARS)
        log.warning("machine %s: worker ended: %s", self.name, reason)
        cause = shortened(printable(ended.cause), CAUSE_CHARS) or Cause.FAILED
        for line in ended.stderr_tail:
            log.info("machine %s: its last lines: %s", self.name, shortened(printable(line)))
        if not ended.restarting:
            memory = ", out of memory" if ended.out_of_memory else ""
            # A worker that ends itself says which machine it is on.
            named = reason.startswith(f"machine {self.name} ")
            prefix = "" if named else f"machine {self.name}{memory}: "
            self._lose(StageError(f"{prefix}{reason}"), cause)
        else:
            events.publish(WorkerEnded(self.name, reason, cause))


async def _read(call: grpc.aio.UnaryStreamCall[StageSpec, StageEvent]) -> object:
    return await call.read()


def _is_late(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
