"""The machines of this cluster: found by mDNS or named as peers, and asked what they are."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import grpc

from coordinator.planning.engines import ENGINES
from coordinator.planning.machine import Machine
from unicluster.checkpoints.fingerprint import whole
from unicluster.cluster import here
from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.discovery import Browser
from unicluster.cluster.known_machines import remember
from unicluster.cluster.records import Kind
from unicluster.cluster.versions import mismatch
from unicluster.errors import InputError, UnavailableError, UniclusterError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Credentials
from unicluster.trust.keyring import Membership
from unicluster.v1.node_pb2 import DescribeNodeRequest, InspectRequest, ModelLayout, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
# An agent on this machine answers in milliseconds, unless the machine is very busy.
HERE_SECONDS = 1.0
# Machines also name each other, so the first one found is nearly enough.
QUIET_SECONDS = 1.0
SEARCH_SECONDS = 6.0
NOBODY = (
    "no machine of this cluster answers: run `unicluster join` on each, or name one with "
    "--peer HOST:PORT if multicast does not reach it"
)
# Inspecting builds a model's whole tree, and may have to fetch its configuration first.
INSPECT_SECONDS = 600.0


class Members:
    """An async context manager that keeps browsing while it is open."""

    def __init__(
        self,
        cluster: Cluster | Membership,
        identity: Credentials,
        peers: Sequence[str] = (),
        host: str = "",
    ) -> None:
        fingerprints = (
            cluster.fingerprint if isinstance(cluster, Cluster) else lambda: cluster.fingerprints
        )
        self._identity = identity
        self._peers = tuple(peers)
        self._browser = Browser(Kind.NODE, fingerprints, host=host)
        self._remembered: dict[str, str] = {}
        self._here: set[str] = set()  # addresses of agents of this machine that answered
        self._mismatched: dict[str, str] = {}  # why a machine is left out, by address

    async def __aenter__(self) -> "Members":
        await self._browser.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._browser.__aexit__(kind, error, trace)

    @property
    def names(self) -> set[str]:
        """Names of the machines that were found by multicast."""
        return set(self._browser.found)

    async def find(self) -> None:
        """Learns of all machines from an agent on this one, or searches for them without one."""
        if not await self.ask_here():
            await self.search()

    async def search(self, names: Sequence[str] | None = None) -> None:
        """Waits until all of `names` are found, or, without names, until no more turn up.

        Raises UnavailableError naming the machines that are not there.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + SEARCH_SECONDS
        if names is None:
            await self._browser.wait_for(
                lambda machines: bool(machines or self._peers), SEARCH_SECONDS
            )
            while clock() < deadline:
                if not await self._grew():
                    return
            return
        while True:
            known = {info.name for info, _ in await self.nodes()}
            missing = sorted(set(names) - known)
            if not missing:
                return
            if clock() > deadline:
                there = ", ".join(sorted(known)) or "none"
                raise UnavailableError(
                    f"no machine named {', '.join(missing)} in this cluster; found: {there}"
                )
            await self._grew()

    async def nodes(self) -> list[tuple[NodeInfo, str]]:
        """Descriptions of all machines that answer, with their addresses.

        Machines that only other machines know of are asked too.
        """
        names = {m.address: name for name, m in self._browser.found.items()}
        waiting = {*names, *self._peers, *self._here}
        asked: set[str] = set()
        answered: dict[str, tuple[NodeInfo, str]] = {}
        while waiting:
            # What others have heard of may be gone for a while before they forget it.
            level = logging.INFO if asked else logging.WARNING
            asked |= waiting
            calls = [self._describe(names.get(a, a), a, level) for a in sorted(waiting)]
            answers = [answer for answer in await asyncio.gather(*calls) if answer is not None]
            for info, address in answers:
                # Others know an address of this machine that can be reached from there.
                before = answered.get(info.name)
                if before is None or (before[1] in self._here and address not in self._here):
                    answered[info.name] = info, address
            waiting = {peer for info, _ in answers for peer in info.peers} - asked
        known = {name: address for name, (_, address) in answered.items()}
        if known and known != self._remembered:
            self._remembered = known
            remember(known)
        return list(answered.values())

    async def machines(self) -> list[Machine]:
        """All machines that answer, for the planner. Raises UnavailableError when there is none."""
        nodes = await self.nodes()
        if not nodes:
            raise UnavailableError(next(iter(self._mismatched.values()), NOBODY))
        return [Machine.from_proto(info, address) for info, address in nodes]

    async def inspect(
        self, request: InspectRequest, names: Sequence[str] | None = None
    ) -> ModelLayout:
        """Layout of a model, from the first machine (of `names`, if any) that can inspect it.

        Raises what the machines say when none can, InputError for a directory that isn't here.
        """
        if os.path.isabs(request.model) and not request.revision and not request.config_json:
            request = await asyncio.to_thread(_with_revision, request)
        problem: UniclusterError | None = None
        asked = [m for m in await self.machines() if names is None or m.name in names]
        for machine in sorted(asked, key=_preference):
            async with connect(machine.address, self._identity) as channel:
                try:
                    return await NodeStub(channel).Inspect(request, timeout=INSPECT_SECONDS)
                except grpc.aio.AioRpcError as error:
                    problem = problem or as_error(error, f"machine {machine.name}")
        raise problem or InputError(f"{request.model}: no machine could inspect it")

    async def changed(self, timeout: float) -> None:
        """Returns when a machine came or went, or after `timeout` seconds."""
        before = set(self._browser.found)
        await self._browser.wait_for(lambda machines: set(machines) != before, timeout)

    async def ask_here(self) -> bool:
        """Whether an agent of this machine answered that has had time to find the others."""
        services = here.services(Kind.NODE)
        calls = [self._describe("here", s.address, logging.INFO, HERE_SECONDS) for s in services]
        answers = await asyncio.gather(*calls)
        there = [s for s, answer in zip(services, answers, strict=True) if answer is not None]
        self._here = {service.address for service in there}
        return any(service.settled for service in there)

    async def _grew(self) -> bool:
        """Waits for a machine more than are known now; False when none came for a while."""
        count = len(self._browser.found)
        return await self._browser.wait_for(lambda machines: len(machines) > count, QUIET_SECONDS)

    async def _describe(
        self, name: str, address: str, level: int, timeout: float = ANSWER_SECONDS
    ) -> tuple[NodeInfo, str] | None:
        """None for a machine that does not answer, which is logged at `level`."""
        async with connect(address, self._identity) as channel:
            try:
                info = await NodeStub(channel).Describe(DescribeNodeRequest(), timeout=timeout)
            except grpc.aio.AioRpcError as error:
                log.log(level, "%s", as_error(error, f"machine {name} ({address})"))
                return None
        wrong = mismatch(f"machine {info.name}", info.version, info.protocol, info.oldest_protocol)
        if wrong:
            if self._mismatched.get(address) != wrong:
                log.warning("%s", wrong)
            self._mismatched[address] = wrong
            return None
        self._mismatched.pop(address, None)
        return info, address


def _preference(machine: Machine) -> tuple[bool, ...]:
    """A sort key: first the machines with the most preferred engine."""
    return tuple(not machine.can(engine) for engine in ENGINES)


def _with_revision(request: InspectRequest) -> InspectRequest:
    """A request for a directory in the state that it has here: agents look into no other."""
    pinned = InspectRequest()
    pinned.CopyFrom(request)
    pinned.revision = whole(Path(request.model)).manifest.revision
    return pinned
