"""Which machine of a ring is stuck, when frames don't come back."""

import asyncio
from collections.abc import Sequence

import grpc

from unicluster.deadlines import Work
from unicluster.dialing.dialer import Dialer
from unicluster.errors import StageError, UniclusterError
from unicluster.stall import stuck_reason
from unicluster.trust.identity import Credentials
from unicluster.v1.stage_pb2 import ClockReading, ClockRequest, RouteStop, StageInfo
from unicluster.v1.stage_pb2_grpc import StageStub

ASK_SECONDS = 2.0


async def find_stuck(
    stages: Sequence[tuple[RouteStop, StageInfo]],
    identity: Credentials,
    seconds: float,
    work: Work,
) -> StageError:
    """The error for a ring from which nothing has come for `seconds`, naming the machine.

    Asks all stages what they are at. One that does not answer is stuck; else the one that has
    been at the same work for longest; else a frame is lost somewhere among them.
    """
    readings = await asyncio.gather(*(_ask(stop, identity) for stop, _ in stages))
    asked = list(zip(stages, readings, strict=True))
    for (stop, info), reading in asked:
        if reading is None:
            reason = stuck_reason(name_of(stop.node, info), seconds, work)
            return StageError(f"{reason}; it answers nothing")
    (stop, info), busiest = max(asked, key=lambda pair: pair[1].running_s if pair[1] else 0.0)
    if busiest is not None and busiest.running_s > seconds / 2:
        doing = busiest.work[:80] if busiest.work.isprintable() else work
        return StageError(stuck_reason(name_of(stop.node, info), seconds, doing))
    names = ", ".join(name_of(stop.node, info) for (stop, info), _ in asked)
    return StageError(f"{stuck_reason(names, seconds, work)}; a frame was lost between them")


def name_of(node: str, info: StageInfo) -> str:
    """ "machine bob (layers 10 to 19)"."""
    return f"machine {node} (layers {info.first_layer} to {max(info.end_layer, 1) - 1})"


async def _ask(stop: RouteStop, identity: Credentials) -> ClockReading | None:
    """Asks what a stage is at; None if it does not answer."""
    try:
        connected, _ = await Dialer(identity).connect_stop(stop)
        async with connected as channel:
            return await StageStub(channel).Clock(ClockRequest(), timeout=ASK_SECONDS)
    except (grpc.aio.AioRpcError, UniclusterError):
        return None
