"""The machines of this cluster: found by mDNS or named as peers, and asked what they are."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import grpc

from coordinator.fleet.descriptions import nonsense
from coordinator.fleet.left_stages import LeftStage
from coordinator.fleet.news import has_changed
from coordinator.fleet.slept import Slept
from coordinator.planning.engines import ENGINES
from coordinator.planning.machine import Machine
from unicluster.checkpoints.fingerprint import whole
from unicluster.cluster import here
from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.discovery import Browser
from unicluster.cluster.known_machines import remember
from unicluster.cluster.records import Kind, ServiceRecord, is_address, valid_addresses
from unicluster.cluster.versions import mismatch
from unicluster.dialing.dialer import Dialer, Reached, history
from unicluster.errors import InputError, TrustError, UnavailableError, UniclusterError, shown
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Credentials
from unicluster.trust.keyring import Membership
from unicluster.v1.node_pb2 import (
    DRAIN_ORDERS_GIVEN,
    DRAIN_ORDERS_UNKNOWN,
    DescribeNodeRequest,
    DrainRequest,
    InspectRequest,
    ModelLayout,
    NodeInfo,
)
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
# One that was lost just now, once it is asked whether it is there.
LOST_SECONDS = 0.5
# An agent on this machine answers in milliseconds, unless the machine is very busy.
HERE_SECONDS = 1.0
# Machines also name each other, so the first one found is nearly enough.
QUIET_SECONDS = 1.0
SEARCH_SECONDS = 6.0
NOBODY = (
    "no machine of this cluster answers: run `unicluster join` on each, or name one with "
    "--peer HOST:PORT if multicast does not reach it"
)
# That one machine may name.
MOST_PEERS = 1024
# How long a look at the addresses that are not used now may delay an answer.
LOOK_SECONDS = 0.2
# Inspecting builds a model's whole tree, and may have to fetch its configuration first.
INSPECT_SECONDS = 600.0


@dataclass(frozen=True, order=True)
class _Hint:
    """Where somebody may be. An empty name: whoever it is."""

    name: str
    addresses: tuple[str, ...]


class Drains(Protocol):
    """Which machines are drained, as it is kept."""

    def follow(self, name: str, machine: str, *, drained: bool, ordered: bool | None) -> bool:
        """Notes how a machine says that it is; returns whether it is to be drained again.

        machine: its id, by its key; empty where its certificate does not name one.
        """


# A machine's own description, and what TLS proved of it.
_Member = tuple[NodeInfo, Reached]


class Members:
    """An async context manager that keeps browsing while it is open."""

    def __init__(
        self,
        cluster: Cluster | Membership,
        identity: Credentials,
        peers: Sequence[str] = (),
        host: str = "",
        service: str = "",
        drains: Drains | None = None,
    ) -> None:
        """service: usable memory is stated as if its stages had ended: it is planned anew.

        drains: which machines are drained, for those whose agents have started since.
        """
        fingerprints = (
            cluster.fingerprint if isinstance(cluster, Cluster) else lambda: cluster.fingerprints
        )
        self._identity = identity
        self._peers = tuple(peers)
        self._asked = DescribeNodeRequest(without_service=service)
        self._drains = drains
        self._slept = Slept()
        # Of the service, when `machines` asked last: stages that nobody holds; who holds others.
        self.orphans: list[LeftStage] = []
        self.holders: list[str] = []
        self._expected: set[str] = set()
        self._browser = Browser(Kind.NODE, fingerprints, host=host)
        self._dialer = Dialer(identity)
        self._remembered: dict[str, str] = {}
        self._here: set[str] = set()  # addresses of agents of this machine that answered
        self._mismatched: dict[str, str] = {}  # why a machine is left out, by name
        self._looking: set[asyncio.Task[None]] = set()
        self._bound: dict[str, str] = {}  # ids of the machines asked so far, by name
        self._called: dict[str, set[str]] = {}  # addresses that --peer names a machine by
        self._twins: set[str] = set()  # names of several machines, which were reported

    async def __aenter__(self) -> "Members":
        await self._browser.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
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
        """Descriptions of all machines that answer, with the addresses they were reached at.

        Machines that only other machines know of are asked too.
        """
        return [(info, reached.address) for info, reached in await self._answering()]

    async def machines(self, lost: Sequence[Machine] = (), *, quiet: bool = False) -> list[Machine]:
        """All machines that answer, for the planner. Raises UnavailableError when there is none.

        Those that were `lost` just now are not waited for: they answer at once or not at all.
        quiet: for one who looks again and again, those that don't answer are no news.
        """
        answering = await self._answering(lost, quiet=quiet)
        if self._drains is not None:
            answering = [await self._as_drained(self._drains, *member) for member in answering]
        if not answering:
            raise UnavailableError(next(iter(self._mismatched.values()), NOBODY))
        machines = [
            Machine.from_proto(
                info,
                reached.address,
                self._addresses_of(info),
                reached.machine if reached.is_pinned else "",
            )
            for info, reached in answering
        ]
        self._slept.note({info.name: info.slept_s for info, _ in answering})
        service = self._asked.without_service
        stages = [
            (LeftStage(machine, spec, gone=False), spec.deployment in info.orphaned)
            for machine, (info, _) in zip(machines, answering, strict=True)
            for spec in info.stages
            if service and spec.service == service
        ]
        self.orphans = [stage for stage, orphaned in stages if orphaned]
        self.holders = [stage.spec.coordinator for stage, orphaned in stages if not orphaned]
        return machines

    async def _as_drained(self, drains: Drains, info: NodeInfo, reached: Reached) -> _Member:
        """The machine, drained again where its agent started since it was drained."""
        unknown = info.drain_orders == DRAIN_ORDERS_UNKNOWN
        ordered = None if unknown else info.drain_orders == DRAIN_ORDERS_GIVEN
        machine = reached.machine if reached.is_pinned else ""
        if not drains.follow(info.name, machine, drained=info.draining, ordered=ordered):
            return info, reached
        who = f"machine {info.name} ({reached.address})"
        async with self._dialer.connect(reached) as channel:
            try:
                drained = await NodeStub(channel).Drain(DrainRequest(), timeout=ANSWER_SECONDS)
            except grpc.aio.AioRpcError as error:
                log.warning("it could not be drained again: %s", as_error(error, who))
                return info, reached
        if drained.name != info.name or nonsense(drained):
            log.warning("%s could not be drained again: it answers nonsense", who)
            return info, reached
        log.warning(
            "%s is still drained: `unicluster drain --undo %s` offers it again",
            *(who, info.name),
        )
        return drained, reached

    def woken(self) -> dict[str, float]:
        """Machines that were asleep since this was asked last, and for how many seconds."""
        return self._slept.take()

    def expect(self, addresses: Iterable[str]) -> None:
        """Machines are asked at these addresses too, where they were before."""
        self._expected.update(valid_addresses(addresses))

    def _addresses_of(self, info: NodeInfo) -> list[str]:
        """All addresses at which a machine may be."""
        record = self._browser.found.get(info.name)
        heard = [*info.addresses, *(record.addresses if record is not None else ())]
        return [*valid_addresses(heard), *self._called.get(info.name, ())]

    async def _answering(
        self, lost: Sequence[Machine] = (), *, quiet: bool = False
    ) -> list[_Member]:
        names = {machine.name for machine in lost}
        addresses = {a for machine in lost for a in (machine.address, *machine.addresses)}
        waiting = {_Hint(m.name, m.addresses) for m in self._browser.found.values()}
        waiting |= {_Hint("", (peer,)) for peer in (*self._peers, *self._here, *self._expected)}
        asked: set[str] = set()  # addresses
        answered: dict[str, _Member] = {}
        while waiting:
            # What others have heard of may be gone for a while before they forget it.
            level = logging.INFO if asked or quiet else logging.WARNING
            asked |= {address for hint in waiting for address in hint.addresses}
            calls = [
                self._describe_lost(hint, level)
                if hint.name in names or addresses.intersection(hint.addresses)
                else self._describe(hint, level)
                for hint in sorted(waiting)
            ]
            answers = [answer for answer in await asyncio.gather(*calls) if answer is not None]
            for info, reached in answers:
                # Others know an address of this machine that can be reached from there.
                before = answered.get(info.name)
                if before is None or self._is_here(before):
                    answered[info.name] = info, reached
            heard = {hint for info, _ in answers for hint in _heard_of(info)}
            unknown = {
                h for h in heard if h.name not in answered or self._is_here(answered[h.name])
            }
            waiting = {h for h in unknown if not asked >= {*h.addresses}}
        await self._report_twins()
        known = {name: reached.address for name, (_, reached) in answered.items()}
        if known and known != self._remembered:
            self._remembered = known
            remember(known)
        return list(answered.values())

    async def _report_twins(self) -> None:
        """Warns once of machines that share a name, of which one is asked and the others not."""
        candidates = [a for m in self._browser.found.values() for a in m.addresses]
        looking = asyncio.create_task(self._dialer.look(candidates))
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)
        await asyncio.wait([looking], timeout=LOOK_SECONDS)
        for name, record in self._browser.found.items():
            addresses = history.who(name, record.addresses)
            if len(addresses) > 1 and name not in self._twins:
                self._twins.add(name)
                log.warning(
                    "%d machines are named %s, at %s: join all but one again with another --name",
                    len(addresses),
                    name,
                    " and ".join(sorted(addresses.values())),
                )

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
            async with connect(machine.address, self._identity, machine=machine.id) as channel:
                try:
                    return await NodeStub(channel).Inspect(request, timeout=INSPECT_SECONDS)
                except grpc.aio.AioRpcError as error:
                    problem = problem or as_error(error, f"machine {machine.name}")
        raise problem or InputError(f"{request.model}: no machine could inspect it")

    @property
    def found(self) -> Mapping[str, ServiceRecord]:
        """Machines as multicast tells of them now, by name."""
        return self._browser.found

    async def changed(
        self, timeout: float, since: Mapping[str, ServiceRecord] | None = None
    ) -> bool:
        """Whether machines have changed (see `has_changed`): returns then, or after `timeout` s.

        since: `found` as it was; None: now.
        """
        before = self._browser.found if since is None else since
        return await self._browser.wait_for(lambda now: has_changed(before, now), timeout)

    async def ask_here(self) -> bool:
        """Whether an agent of this machine answered that has had time to find the others."""
        services = here.services(Kind.NODE)
        hints = [_Hint("", (service.address,)) for service in services]
        calls = [self._describe(hint, logging.INFO, HERE_SECONDS) for hint in hints]
        answers = await asyncio.gather(*calls)
        there = [s for s, answer in zip(services, answers, strict=True) if answer is not None]
        self._here = {service.address for service in there}
        return any(service.settled for service in there)

    async def _grew(self) -> bool:
        """Waits for a machine more than are known now; False when none came for a while."""
        count = len(self._browser.found)
        return await self._browser.wait_for(lambda machines: len(machines) > count, QUIET_SECONDS)

    def _is_here(self, member: _Member) -> bool:
        return member[1].address in self._here

    async def _reach(self, hint: _Hint) -> Reached:
        """The machine that had the name before, as long as it answers; else another one of it."""
        name, who = hint.name, f"machine {hint.name or hint.addresses[0]}"
        bound = self._bound.get(name, "") if name else ""
        try:
            reached = await self._dialer.reach(hint.addresses, who, name=name, machine=bound)
        except UnavailableError:
            if not bound or not history.who(name, hint.addresses).keys() - {bound}:
                raise
            reached = await self._dialer.reach(hint.addresses, who, name=name)
            log.warning("machine %s is another one now, at %s", name, reached.address)
        self._bound[reached.name] = reached.machine
        if not hint.name:
            self._called.setdefault(reached.name, set()).update(hint.addresses)
        return reached

    async def _describe_lost(self, hint: _Hint, level: int) -> _Member | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOST_SECONDS):
                return await self._describe(hint, level)
        return None

    async def _describe(
        self, hint: _Hint, level: int, timeout: float = ANSWER_SECONDS
    ) -> _Member | None:
        """None for a machine that does not answer, which is logged at `level`."""
        try:
            reached = await self._reach(hint)
        except (UnavailableError, TrustError) as error:
            log.log(level, "%s", error)
            return None
        async with self._dialer.connect(reached) as channel:
            try:
                info = await NodeStub(channel).Describe(self._asked, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                who = f"machine {reached.name} ({reached.address})"
                log.log(level, "%s", as_error(error, who))
                return None
        if info.name != reached.name:
            log.warning(
                "machine %s (%s) calls itself %s: it is left out",
                *(reached.name, reached.address, shown(info.name)),
            )
            return None
        if wrong := nonsense(info):
            log.warning(
                "machine %s (%s) states %s: it is left out", reached.name, reached.address, wrong
            )
            return None
        wrong = mismatch(f"machine {info.name}", info.version, info.protocol, info.oldest_protocol)
        if wrong:
            if self._mismatched.get(info.name) != wrong:
                log.warning("%s", wrong)
            self._mismatched[info.name] = wrong
            return None
        self._mismatched.pop(info.name, None)
        return info, reached


def _heard_of(info: NodeInfo) -> set[_Hint]:
    """The machines that another one has heard of."""
    known = {(each.name, tuple(valid_addresses(each.addresses))) for each in info.known}
    hints = {_Hint(name, addresses) for name, addresses in known if addresses}
    grouped = {address for hint in hints for address in hint.addresses}
    others = [a for a in info.peers[:MOST_PEERS] if a not in grouped and is_address(a)]
    return hints | {_Hint("", (address,)) for address in others}


def _preference(machine: Machine) -> tuple[bool, ...]:
    """A sort key: first the machines with the most preferred engine."""
    return tuple(not machine.can(engine) for engine in ENGINES)


def _with_revision(request: InspectRequest) -> InspectRequest:
    """A request for a directory in the state that it has here: agents look into no other."""
    pinned = InspectRequest()
    pinned.CopyFrom(request)
    pinned.revision = whole(Path(request.model)).manifest.revision
    return pinned
