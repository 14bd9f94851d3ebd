"""Stages that a deployment has left on their machines, for the next one to adopt."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from coordinator.planning.machine import Machine
from coordinator.planning.placement import Stage
from unicluster.cluster.channels import as_error
from unicluster.dialing.dialer import Dialer
from unicluster.errors import UniclusterError
from unicluster.retry import attempts
from unicluster.stage_key import stage_key
from unicluster.v1.node_pb2 import ReleaseRequest, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

# A worker is given 5 s to end before it is killed.
RELEASE_SECONDS = 7.0
# Pauses until a machine that had gone is tried again.
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 4.0


@dataclass(frozen=True)
class LeftStage:
    """A stage that nobody holds, on its machine for its grace, and then no more.

    gone: its machine was lost, and comes back or does not.
    """

    machine: Machine
    spec: StageSpec
    gone: bool

    def is_in(self, stages: Sequence[Stage], specs: Sequence[StageSpec]) -> bool:
        """Whether a deployment of these stages adopts it."""
        return any(
            stage.machine.name == self.machine.name and stage_key(spec) == stage_key(self.spec)
            for stage, spec in zip(stages, specs, strict=True)
        )


class LeftStages:
    """Stages that one service left, until its next deployment takes them or they are released."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._left: list[LeftStage] = []
        self._releasing: set[asyncio.Task[None]] = set()

    def add(self, left: Iterable[LeftStage]) -> None:
        known = {(each.machine.name, each.spec.deployment) for each in self._left}
        self._left += [e for e in left if (e.machine.name, e.spec.deployment) not in known]

    async def release_but(self, stages: Sequence[Stage], specs: Sequence[StageSpec]) -> None:
        """Releases those that a deployment does not adopt, and returns when their memory is free.

        A machine that had gone is not waited for: it releases its stage when it comes back.
        """
        useless = [each for each in self._left if not each.is_in(stages, specs)]
        self._left = []
        for each in useless:
            if each.gone:
                task = asyncio.create_task(self._release_later(each))
                self._releasing.add(task)
                task.add_done_callback(self._releasing.discard)
        await self._release([each for each in useless if not each.gone])

    async def close(self) -> None:
        """Releases all, on the machines that are there."""
        for task in self._releasing:
            task.cancel()
        await asyncio.gather(*self._releasing, return_exceptions=True)
        await self._release([each for each in self._left if not each.gone])

    async def _release(self, left: Iterable[LeftStage]) -> None:
        calls = (_release(each, self._dialer) for each in left)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(error, UniclusterError):
                log.info("a stage ends with its grace only: %s", error)
            elif error is not None:
                raise error

    async def _release_later(self, left: LeftStage) -> None:
        """Tries until the stage's grace has ended: then it is gone anyway."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left.spec.orphan_grace_s):
                async for attempt in attempts(
                    f"releasing a stage on {left.machine.name}",
                    lambda error: isinstance(error, UniclusterError),
                    first=FIRST_RETRY_SECONDS,
                    last=LAST_RETRY_SECONDS,
                ):
                    with attempt:
                        await _release(left, self._dialer)


async def _release(left: LeftStage, dialer: Dialer) -> None:
    machine, who = left.machine, f"machine {left.machine.name}"
    reached = await dialer.reach(
        machine.addresses or [machine.address], who, name=machine.name, machine=machine.id
    )
    async with dialer.connect(reached) as channel:
        request = ReleaseRequest(deployment=left.spec.deployment)
        try:
            await NodeStub(channel).Release(request, timeout=RELEASE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise as_error(error, who) from None
