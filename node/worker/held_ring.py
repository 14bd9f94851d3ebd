"""An open ring with its model, for as long as a coordinator holds it, and a while longer."""

import asyncio
from collections.abc import Callable, Iterable

from node.metering.clocks import follow
from node.pipeline.pipeline_model import Front, PipelineModel
from node.ring.ring import Ring
from unicluster.cluster.channels import split_address
from unicluster.deadlines import WorkDeadlines
from unicluster.errors import UniclusterError
from unicluster.trust.identity import Credentials
from unicluster.v1.stage_pb2 import RouteStop, StageInfo

# Name, id of the machine, or where it has none its host, and port of a worker.
_Worker = tuple[str, str, int]


class HeldRing:
    """stages: of the whole ring, the head's first. broken: set with the reason of its end."""

    def __init__(
        self,
        route: Iterable[RouteStop],
        ring: Ring | None,
        stages: list[StageInfo],
        model: PipelineModel,
        identity: Credentials,
    ) -> None:
        self.stages = stages
        self.model = model
        self.broken: asyncio.Future[UniclusterError] = asyncio.get_running_loop().create_future()
        self._workers = [_worker(stop) for stop in route]
        self._ring = ring
        self._following: asyncio.Task[None] | None = None
        if ring is not None:
            clocks = follow(model.trips.clocks, ring.route, identity)
            self._following = asyncio.create_task(clocks)

    @classmethod
    async def open(
        cls,
        front: Front,
        info: StageInfo,
        route: list[RouteStop],
        identity: Credentials,
        deadlines: WorkDeadlines,
        on_failure: Callable[[UniclusterError], None],
        *,
        prebuilt: bool,
    ) -> "HeldRing":
        """Connects the stages of `route` behind this head. Raises and calls as Ring.open does."""
        ring, stages = None, [info]
        if route:
            ring = await Ring.open(route, identity, on_failure, deadlines)
            stages.extend(ring.stages.stages)
        model = PipelineModel(front, ring, info.node, prebuilt=prebuilt)
        return cls(route, ring, stages, model, identity)

    def fits(self, route: Iterable[RouteStop]) -> bool:
        """Whether it goes through the workers of `route`, and has not broken."""
        failed = self.broken.done() or self.model.failure is not None
        return not failed and self._workers == [_worker(stop) for stop in route]

    def end(self, error: UniclusterError) -> None:
        """Notes why it is of no more use; the first reason counts."""
        if not self.broken.done():
            self.broken.set_result(error)

    async def close(self) -> None:
        """Ends its streams; the stages then free all caches of this head."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._ring is not None:
            await self._ring.close()


def _worker(stop: RouteStop) -> _Worker:
    """Identity of a worker, at whichever of its machine's addresses it is reached."""
    host, port = split_address(stop.address)
    return stop.node, stop.machine or host, port
