"""The state of a service, as it is when it is said, and not when its head was asked."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from coordinator.serving.service import Service
from unicluster.v1.chat_pb2 import ChatInfo


class Lost(Service):
    """A service whose head is lost while it is asked."""

    def __init__(self) -> None:
        self.now = "ready"
        self.asked = asyncio.Event()
        self.gone = asyncio.Event()
        self.deployment: Any = SimpleNamespace(
            chat=SimpleNamespace(Describe=self._answer, Measure=self._answer)
        )
        self._events: Any = SimpleNamespace(losses=Counter())

    def info(self) -> ChatInfo:
        return ChatInfo(state=self.now)

    async def _answer(self, request: Any, timeout: float) -> ChatInfo:
        self.asked.set()
        await self.gone.wait()
        no_metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, no_metadata, no_metadata)


@pytest.mark.parametrize("kind", ["describe", "measure"])
async def test_a_head_that_is_lost_while_it_is_asked_leaves_no_older_state(kind: str) -> None:
    service = Lost()
    asking = asyncio.create_task(getattr(service, kind)())
    await service.asked.wait()

    service.now = "recovering"
    service.gone.set()

    said = await asking
    info = said if kind == "describe" else said.info
    assert info.state == "recovering"
