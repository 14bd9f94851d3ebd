"""Which of a machine's addresses to use: all are tried, and TLS tells who answers.

As in RFC 8305: the most promising address first, and another one after each short pause, or at
once where one fails; the first to prove that it is the right machine wins.
"""

import asyncio
import functools
import ipaddress
import socket
import ssl
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.x509.oid import NameOID

from unicluster.cluster.channels import connect, join_address, split_address
from unicluster.cluster.interfaces import ways
from unicluster.cluster.sizes import CONTROL_BYTES
from unicluster.errors import TrustError, UnavailableError, UniclusterError
from unicluster.trust.identity import SERVER_NAME, Credentials, Identity, machine_id
from unicluster.v1.stage_pb2 import RouteStop

# Between two addresses of a machine; RFC 8305 recommends it.
STAGGER_SECONDS = 0.25
PROBE_SECONDS = 3.0
# Of one machine.
MOST_ADDRESSES = 32
# So long an address that failed comes after all others.
AVOID_SECONDS = 60.0
# So long nobody asks again who is at an address that is not needed now.
FRESH_SECONDS = 20.0
MOST_REMEMBERED = 4096

NO_CERTIFICATE = "has no certificate of this cluster"


@dataclass(frozen=True)
class Reached:
    """Who TLS proved to be at an address.

    machine: the id that follows from its key. is_pinned: its certificate names the id too, so that
    a channel can insist on it.
    """

    address: str
    name: str
    machine: str
    is_pinned: bool


@dataclass(frozen=True)
class _Tried:
    """How the last look at an address ended: with `reached`, or a `problem`. at: monotonic."""

    at: float
    reached: Reached | None = None
    problem: str = ""


class History:
    """Addresses that were tried by this process. Threads may share it."""

    def __init__(self) -> None:
        self._tried: dict[str, _Tried] = {}
        self._heard: dict[str, float] = {}

    def note(self, address: str, tried: _Tried) -> None:
        self._tried.pop(address, None)  # the newest last
        self._tried[address] = tried
        while len(self._tried) > MOST_REMEMBERED:
            del self._tried[next(iter(self._tried))]

    def slow(self, address: str) -> None:
        """Notes that an address that was tried first had not answered when another one did."""
        self.note(address, _Tried(time.monotonic(), problem="does not answer"))

    def heard(self, address: str) -> None:
        """Notes that packets came from there."""
        self._heard.pop(address, None)
        self._heard[address] = time.monotonic()
        while len(self._heard) > MOST_REMEMBERED:
            del self._heard[next(iter(self._heard))]

    def fresh(self, address: str, seconds: float) -> _Tried | None:
        """How the last look at an address ended, if that was within the last `seconds`."""
        tried = self._tried.get(address)
        return tried if tried is not None and time.monotonic() - tried.at < seconds else None

    def who(self, name: str, addresses: Iterable[str]) -> dict[str, str]:
        """The machines that proved to have a name at some of `addresses` lately: ids, and where."""
        looks = [self.fresh(address, AVOID_SECONDS) for address in _ways(addresses)]
        found = [look.reached for look in looks if look is not None and look.reached is not None]
        return {each.machine: each.address for each in reversed(found) if each.name == name}

    def in_order(self, addresses: Iterable[str]) -> list[str]:
        """The most promising first.

        Those that failed lately come last; of the others those on the best link, and of one link
        those that answered before, then those that packets came from.
        """
        found = _ways(addresses)

        def promise(address: str) -> tuple[bool, tuple[Any, ...], bool, bool]:
            tried = self.fresh(address, AVOID_SECONDS)
            failed = tried is not None and tried.reached is None
            answered = tried is not None and tried.reached is not None
            return (failed, found[address], not answered, address not in self._heard)

        return sorted(found, key=promise)


# One for all of a process: who dials next profits from what was tried.
history = History()


class Dialer:
    """Reaches machines under whichever of their addresses answers."""

    def __init__(self, identity: Credentials, seen: History = history) -> None:
        self._identity = identity
        self._history = seen

    async def reach(
        self, addresses: Iterable[str], who: str, *, name: str = "", machine: str = ""
    ) -> Reached:
        """The best address at which the machine answers: the one of that name and that id.

        addresses: "host:port", of which the host may be a name with several addresses; IPv6
        addresses of a link may lack their scope. who: for messages.
        name, machine: empty for any. Raises UnavailableError or TrustError with what happened at
        each address.
        """
        problems: dict[str, str] = {}
        candidates = self._history.in_order(await _resolved(addresses, problems))
        running: dict[asyncio.Task[Reached], str] = {}
        waiting = iter(candidates)
        try:
            while self._start_next(waiting, running) or running:
                done, _ = await asyncio.wait(
                    running, timeout=STAGGER_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in [each for each in running if each in done]:
                    address = running.pop(task)
                    try:
                        reached = task.result()
                    except UniclusterError as error:
                        problems[address] = str(error)
                        continue
                    if wrong := _wrong(reached, name, machine):
                        problems[address] = wrong
                        continue
                    for slower in running.values():
                        self._history.slow(slower)
                    return reached
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        raise _unreachable(who, problems)

    async def look(self, addresses: Iterable[str]) -> None:
        """Finds out who is at each address of which that is not known, all at once."""
        stale = [a for a in _ways(addresses) if self._history.fresh(a, FRESH_SECONDS) is None]
        await asyncio.gather(*(self._probe(each) for each in stale), return_exceptions=True)

    async def another_of(self, name: str, addresses: Sequence[str]) -> str:
        """The address at which another machine proves to have this one's `name`; "" for none."""
        await self.look(addresses)
        others = self._history.who(name, addresses)
        others.pop(self._identity.current.machine, None)
        return next(iter(others.values()), "")

    def connect(self, reached: Reached, most_bytes: int = CONTROL_BYTES) -> grpc.aio.Channel:
        """A channel to a machine that was reached, and to no other one."""
        machine = reached.machine if reached.is_pinned else ""
        return connect(reached.address, self._identity, most_bytes=most_bytes, machine=machine)

    async def connect_stop(
        self, stop: RouteStop, most_bytes: int = CONTROL_BYTES
    ) -> tuple[grpc.aio.Channel, RouteStop]:
        """A channel to a stage's worker, and the stop with the address that it is reached at.

        Raises what `reach` does.
        """
        addresses = list(stop.addresses)[:MOST_ADDRESSES] or [stop.address]
        who = f"machine {stop.node}"
        reached = await self.reach(addresses, who, machine=stop.machine)
        at = RouteStop(node=stop.node, address=reached.address, machine=stop.machine)
        return self.connect(reached, most_bytes), at

    def _start_next(
        self, waiting: Iterator[str], running: dict[asyncio.Task[Reached], str]
    ) -> bool:
        address = next(waiting, None)
        if address is None:
            return False
        running[asyncio.create_task(self._probe(address))] = address
        return True

    async def _probe(self, address: str) -> Reached:
        """Who is at an address. Raises UnavailableError or TrustError with a predicate."""
        try:
            reached = await probe(address, self._identity)
        except UniclusterError as error:
            self._history.note(address, _Tried(time.monotonic(), problem=str(error)))
            raise
        self._history.note(address, _Tried(time.monotonic(), reached))
        return reached


async def _resolved(addresses: Iterable[str], problems: dict[str, str]) -> list[str]:
    """Addresses with IP addresses in place of names; names that have none become problems."""
    found: dict[str, None] = {}
    for address in addresses:
        host, port = split_address(address)
        try:
            ipaddress.ip_address(host)
        except ValueError:
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    infos = await asyncio.get_running_loop().getaddrinfo(
                        host, port, type=socket.SOCK_STREAM
                    )
            except (OSError, UnicodeError, TimeoutError):
                problems[address] = "has a name that can't be resolved"
                continue
            hosts = [str(sockaddr[0]) for *_, sockaddr in infos]
            found |= dict.fromkeys(join_address(each, port) for each in hosts)
        else:
            found[address] = None
    return list(found)


async def probe(address: str, identity: Credentials) -> Reached:
    """Who proves by TLS to be a member at `address`.

    Raises UnavailableError, or TrustError for no member, with what goes behind the address in a
    sentence.
    """
    host, port = split_address(address)
    context = _context(identity.current)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            _, writer = await asyncio.open_connection(
                *(host, port),
                ssl=context,
                server_hostname=SERVER_NAME,
            )
    except ssl.SSLCertVerificationError:
        raise TrustError(NO_CERTIFICATE) from None
    except ssl.SSLError:
        raise UnavailableError("does not speak TLS as this cluster does") from None
    except TimeoutError:
        raise UnavailableError("does not answer") from None
    except ConnectionRefusedError:
        raise UnavailableError("refuses connections: is it still running?") from None
    except ConnectionError:
        raise UnavailableError("closed the connection") from None
    except OSError as error:
        raise UnavailableError(
            f"is unreachable: {(error.strerror or str(error)).lower()}"
        ) from None
    try:
        shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    return _who(address, x509.load_der_x509_certificate(shown))


def _who(address: str, certificate: x509.Certificate) -> Reached:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    machine = machine_id(certificate.public_key())
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        known = alternatives.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        known = []
    is_pinned = bool(machine) and f"{machine}.{SERVER_NAME}" in known
    return Reached(address, str(names[0].value) if names else "", machine, is_pinned)


@functools.lru_cache(maxsize=8)
def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=identity.ca_pem)
    context.set_alpn_protocols(["h2"])  # gRPC refuses others
    # Python reads a key only from a file: this one is its owner's, and gone at once.
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder, "pair.pem")
        pair.write_text(identity.key_pem + identity.cert_pem)
        context.load_cert_chain(pair)
    return context


def _wrong(reached: Reached, name: str, machine: str) -> str:
    """Why it is not the machine that was meant; empty if it is."""
    if (name and reached.name != name) or (machine and reached.machine != machine):
        if reached.name == name or not name:
            return f"answers as another machine, {reached.name}"
        return f"answers as {reached.name}"
    return ""


def _unreachable(who: str, problems: dict[str, str]) -> UniclusterError:
    kind = TrustError if set(problems.values()) == {NO_CERTIFICATE} else UnavailableError
    if len(problems) == 1:
        ((address, problem),) = problems.items()
        return kind(f"{who} {problem}" if address in who else f"{who} ({address}) {problem}")
    if not problems:
        return kind(f"{who} has no address that this machine could try")
    each = "; ".join(f"{address} {problem}" for address, problem in problems.items())
    return kind(f"{who} can't be reached: {each}")


def _ways(addresses: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Addresses as they are dialled from here, and how good the way to each is, the least best."""
    by_port: dict[int, list[str]] = {}
    for address in addresses:
        host, port = split_address(address)
        by_port.setdefault(port, []).append(host)
    return {
        join_address(host, port): way
        for port, hosts in by_port.items()
        for host, (_, way) in ways(hosts).items()
    }
