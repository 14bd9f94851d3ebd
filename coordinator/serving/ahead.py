"""Stages that are loaded before a deployment moves to them, beside the one that answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence

from coordinator.fleet.left_stages import LeftStage
from coordinator.planning.placement import Plan
from coordinator.serving.events import Events
from coordinator.serving.lease import Lease
from unicluster.dialing.dialer import Dialer
from unicluster.errors import UnavailableError
from unicluster.v1.node_pb2 import StageSpec


@contextlib.asynccontextmanager
async def loaded_ahead(
    plan: Plan, specs: Sequence[StageSpec], busy: Collection[str], dialer: Dialer, events: Events
) -> AsyncIterator[list[LeftStage]]:
    """Stages of a plan on machines that are not `busy` with others, loaded for the whole block.

    Then they are left: the next deployment adopts them, within their grace. Yields them.
    Raises what keeps one of them from being loaded, which names the machine.
    """
    leases: list[Lease] = []
    holds: list[asyncio.Task[None]] = []
    changed = asyncio.Event()
    async with contextlib.AsyncExitStack() as channels:
        left: list[LeftStage] = []
        for stage, spec in zip(plan.stages, specs, strict=True):
            machine = stage.machine
            if machine.name in busy or not spec.orphan_grace_s:
                continue
            reached = await dialer.reach(
                machine.addresses or [machine.address],
                f"machine {machine.name}",
                name=machine.name,
                machine=machine.id,
            )
            channel = await channels.enter_async_context(dialer.connect(reached))
            leases.append(Lease(stage, spec, channel, reached.address))
            left.append(LeftStage(machine, spec, gone=False))
        try:
            holds += [asyncio.create_task(e.hold(events, changed.set)) for e in leases]
            while not all(lease.worker for lease in leases):
                changed.clear()
                for lease in leases:
                    if lease.lost is not None:
                        raise lease.lost
                await changed.wait()  # a lease ends by its own deadlines
            yield left
        finally:
            for hold in holds:
                hold.cancel()
            await asyncio.gather(*holds, return_exceptions=True)
            # A machine that has gone meanwhile shows when the deployment is loaded.
            with contextlib.suppress(UnavailableError):
                await asyncio.gather(*(lease.until_left() for lease in leases))
