"""The other agents that an agent knows: found by mDNS, named by --peer, or heard of by greeting.

Where multicast does not reach, the agents named by --peer are greeted, and so know this one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

import grpc

from unicluster.cluster.background import going_on
from unicluster.cluster.channels import as_error, connect, join_address
from unicluster.cluster.discovery import Browser
from unicluster.errors import InputError, UniclusterError
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import Greeting
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

GREET_SECONDS = 3.0
# An agent that has been silent for this long is no longer reported.
FORGET_SECONDS = 10.0


class Peers:
    """All other agents of the cluster, as far as this one knows."""

    def __init__(self, named: Sequence[str], browser: Browser) -> None:
        self._named = tuple(named)
        self._browser = browser
        self._greeted_us: dict[str, float] = {}

    def note(self, host: str, port: int) -> None:
        """Notes that another agent has greeted this one."""
        self._greeted_us[join_address(host, port)] = time.monotonic()

    def known(self) -> list[str]:
        """Addresses of the other agents, each as it is reached from here."""
        oldest = time.monotonic() - FORGET_SECONDS
        self._greeted_us = {a: t for a, t in self._greeted_us.items() if t > oldest}
        seen = [machine.address for machine in self._browser.found.values()]
        return sorted({*seen, *self._named, *self._greeted_us})

    @contextlib.asynccontextmanager
    async def greeted(self, identity: Credentials, greeting: Greeting) -> AsyncIterator[None]:
        """Greets the named agents now, and every few seconds while the block runs.

        Raises InputError when one of them has this agent's name.
        """
        first = await asyncio.gather(*(_greet(p, identity, greeting) for p in self._named))
        for error in first:
            if isinstance(error, InputError):
                raise error
            if error is not None:
                log.warning("%s; retrying", error)
        tasks = [
            asyncio.create_task(_keep_greeting(peer, identity, greeting, error))
            for peer, error in zip(self._named, first, strict=True)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_greeting(
    peer: str, identity: Credentials, greeting: Greeting, problem: UniclusterError | None
) -> None:
    """Logs when the peer stops answering; `problem` is the last error."""
    while True:
        await asyncio.sleep(GREET_SECONDS)
        with going_on(f"greeting {peer}"):
            before, problem = problem, await _greet(peer, identity, greeting)
            if problem is not None and before is None:
                log.warning("%s; retrying", problem)


async def _greet(peer: str, identity: Credentials, greeting: Greeting) -> UniclusterError | None:
    """Returns what went wrong, if anything did. A new channel shows the current certificate."""
    try:
        async with connect(peer, identity) as channel:
            await NodeStub(channel).Greet(greeting, timeout=GREET_SECONDS)
    except grpc.aio.AioRpcError as error:
        return as_error(error, f"peer {peer}")
    return None
