"""The other agents that an agent knows: found by mDNS, named by --peer, or heard of by greeting.

Where multicast does not reach, the agents named by --peer are greeted, and so know this one.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

import grpc

from unicluster.channels import as_error, connect, join_address
from unicluster.discovery import Browser
from unicluster.trust import Identity
from unicluster.v1.node_pb2 import Greeting
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

GREET_SECONDS = 3.0
# An agent that has been silent for this long is no longer told of.
FORGET_SECONDS = 10.0


class Peers:
    """All other agents of the cluster, as far as this one knows."""

    def __init__(self, named: Sequence[str], browser: Browser) -> None:
        self._named = tuple(named)
        self._browser = browser
        self._greeted_us: dict[str, float] = {}

    def note(self, host: str, port: int) -> None:
        """Another agent has greeted this one."""
        self._greeted_us[join_address(host, port)] = time.monotonic()

    def known(self) -> list[str]:
        """Their addresses, each as it is reached from here."""
        oldest = time.monotonic() - FORGET_SECONDS
        self._greeted_us = {a: t for a, t in self._greeted_us.items() if t > oldest}
        seen = [machine.address for machine in self._browser.found.values()]
        return sorted({*seen, *self._named, *self._greeted_us})

    async def greet(self, identity: Identity, port: int) -> None:
        """Greets the named agents every few seconds, until cancelled."""
        await asyncio.gather(*(self._greet_one(peer, identity, port) for peer in self._named))

    async def _greet_one(self, peer: str, identity: Identity, port: int) -> None:
        silent = False
        async with connect(peer, identity) as channel:
            while True:
                try:
                    await NodeStub(channel).Greet(Greeting(port=port), timeout=GREET_SECONDS)
                    silent = False
                except grpc.aio.AioRpcError as error:
                    if not silent:
                        log.warning("%s; trying on", as_error(error, f"peer {peer}"))
                    silent = True
                await asyncio.sleep(GREET_SECONDS)
