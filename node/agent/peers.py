"""The other agents that an agent knows: found by mDNS, named by --peer, or heard of by greeting.

Where multicast does not reach, the agents named by --peer are greeted, and so know this one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc

from unicluster.cluster.background import going_on
from unicluster.cluster.channels import as_error, connect, split_address, without_scope
from unicluster.cluster.discovery import Browser
from unicluster.dialing.dialer import history
from unicluster.errors import BusyError, InputError, UniclusterError
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import Greeting, KnownMachine
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

GREET_SECONDS = 3.0
# An agent that has been silent for this long is no longer reported.
FORGET_SECONDS = 10.0
MOST_GREETERS = 1024


MakeGreeting = Callable[[], Greeting]


@dataclass(frozen=True)
class _Greeter:
    """An agent that greeted this one. machine: the id of its certificate. at: monotonic."""

    name: str
    machine: str
    addresses: tuple[str, ...]
    at: float


class Peers:
    """All other agents of the cluster, as far as this one knows."""

    def __init__(self, named: Sequence[str], browser: Browser) -> None:
        self._named = tuple(named)
        self._browser = browser
        self._greeters: dict[str, _Greeter] = {}  # by machine

    def note(self, name: str, machine: str, addresses: Sequence[str]) -> None:
        """Notes that another agent has greeted this one, of that name and id by its certificate.

        addresses: where it may be, the one that it called from first. Raises InputError where
        another machine of that name greets this one too.
        """
        for other in self._alive():
            if other.name == name and other.machine != machine:
                raise InputError(
                    f"a machine named {name} is already in this cluster at {other.addresses[0]}, "
                    f"and another one calls from {addresses[0]}: choose another --name"
                )
        if len(self._greeters) >= MOST_GREETERS and machine not in self._greeters:
            raise BusyError(f"{len(self._greeters)} agents greet this one, and no more may")
        history.heard(addresses[0])
        self._greeters[machine] = _Greeter(name, machine, tuple(addresses), time.monotonic())

    def known(self) -> list[KnownMachine]:
        """The other agents, each with its addresses, the best from here first."""
        found = {each.name: [*each.addresses] for each in self._browser.found.values()}
        for greeter in self._alive():
            found.setdefault(greeter.name, []).extend(greeter.addresses)
        machines = [
            KnownMachine(name=name, addresses=dict.fromkeys(map(without_scope, addresses)))
            for name, addresses in sorted(found.items())
        ]
        return machines + [KnownMachine(addresses=[address]) for address in self._named]

    def elsewhere(self, addresses: Iterable[str]) -> dict[str, list[str]]:
        """Where else the machines at `addresses` may be, as far as this agent knows.

        An IPv6 address of a link, which is dialled on each, is among them.
        """
        known = [list(machine.addresses) for machine in self.known()]
        found = {}
        for address in addresses:
            others = [a for each in known if address in each for a in each if a != address]
            if others or split_address(address)[0].startswith("fe80:"):
                found[address] = others
        return found

    def _alive(self) -> list[_Greeter]:
        oldest = time.monotonic() - FORGET_SECONDS
        self._greeters = {m: g for m, g in self._greeters.items() if g.at > oldest}
        return list(self._greeters.values())

    @contextlib.asynccontextmanager
    async def greeted(self, identity: Credentials, greeting: MakeGreeting) -> AsyncIterator[None]:
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
    peer: str,
    identity: Credentials,
    greeting: MakeGreeting,
    problem: UniclusterError | None,
) -> None:
    """Logs when the peer stops answering; `problem` is the last error."""
    while True:
        await asyncio.sleep(GREET_SECONDS)
        with going_on(f"greeting {peer}"):
            before, problem = problem, await _greet(peer, identity, greeting)
            if problem is not None and before is None:
                log.warning("%s; retrying", problem)


async def _greet(
    peer: str, identity: Credentials, greeting: MakeGreeting
) -> UniclusterError | None:
    """Returns what went wrong, if anything did. A new channel shows the current certificate."""
    try:
        async with connect(peer, identity) as channel:
            await NodeStub(channel).Greet(greeting(), timeout=GREET_SECONDS)
    except grpc.aio.AioRpcError as error:
        return as_error(error, f"peer {peer}")
    return None
