"""Finding each other on the local network: mDNS service discovery, by cluster."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from zeroconf import (  # type: ignore[attr-defined]  # the records are exported, but not in __all__
    DNSAddress,
    DNSQuestionType,
    DNSService,
    IPVersion,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

import unicluster
from unicluster.cluster.background import going_on
from unicluster.cluster.interfaces import best_first, multicast_interfaces, own_addresses
from unicluster.cluster.records import (
    MOST_ADDRESSES,
    Kind,
    ServiceRecord,
    instance_of,
    parse_record,
    service_name_of,
    short,
)
from unicluster.errors import InputError, UnavailableError, shown
from unicluster.trust.identity import check_name

log = logging.getLogger(__name__)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


# It logs each network that multicast can't reach, with a traceback.
logging.getLogger("zeroconf").addFilter(_without_traceback)

# A machine that died without a goodbye is forgotten after about this many seconds and a poll.
TTL = 15
POLL_EVERY = 5.0
# Between two looks for other generations of the cluster's secret.
FOLLOW_EVERY = 2.0

# Several rounds of questions: multicast gets lost on wireless networks.
ANSWER_WITHIN = 2.0


# RFC 1035, 2782 and 3596.
_CLASS_IN, _TYPE_A, _TYPE_AAAA, _TYPE_SRV = 1, 1, 28, 33


# The address, of those that a machine of a name is said to be at, at which another one proves to
# have that name; "" for none.
WhoHas = Callable[[str, Sequence[str]], Awaitable[str]]


class Advertisement:
    """Makes a port known to the cluster while the context is open, and says goodbye after.

        async with Advertisement(Kind.NODE, "studio", 7001, fingerprint, chip="M3 Ultra") as ad:
            await ad.update(usable="96000000000")

    It follows the machine's addresses as they come and go. Entering raises InputError when another
    machine of the cluster has the name; the name of a Kind.CHAT is nobody's choice, and has to be
    unique.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        port: int,
        fingerprint: str,
        *,
        host: str = "",
        who_has: WhoHas | None = None,
        **txt: str,
    ) -> None:
        """`host` limits it to one address of this machine, else all are advertised.

        who_has: with it, a name is taken only where another machine proves to have it; else
        whoever answers takes it.
        """
        self._who_has = who_has
        self._kind = kind
        self._name = check_name(name)
        self._port = port
        self._fingerprint = fingerprint
        self._address = one_address(host)
        self._service_name = service_name_of(kind, name, fingerprint)
        self._txt = {
            "name": name,
            "cluster": fingerprint,
            "version": unicluster.__version__,
            "protocol": str(unicluster.PROTOCOL),
            "oldest": str(unicluster.OLDEST_PROTOCOL),
            **txt,
        }

    async def __aenter__(self) -> Self:
        self._zeroconf = _open(self._address)
        try:
            if self._kind is Kind.NODE:
                await self._refuse_taken_name()
            # No second probe for the name: that one trusts to unicast answers, which
            # get lost when several programs of a machine listen to mDNS.
            self._info = self._make_info()
            await (
                await self._zeroconf.async_register_service(self._info, cooperating_responders=True)
            )
        except BaseException:
            await self._zeroconf.async_close()
            raise
        self._following = asyncio.create_task(self._follow_addresses())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._zeroconf.async_close()  # says goodbye

    async def _follow_addresses(self) -> None:
        while not self._address:
            await asyncio.sleep(POLL_EVERY)
            with going_on("following this machine's addresses"):
                await self._zeroconf.follow_interfaces()
                if _advertised_addresses() != self._addresses:
                    self._info = self._make_info()
                    log.info("this machine is at %s now", ", ".join(self._addresses))
                    await (await self._zeroconf.async_update_service(self._info))

    async def update(self, **txt: str) -> None:
        """Change TXT values; the others stay. Costs a packet only if something differs."""
        changed = self._txt | txt
        if changed != self._txt:
            self._txt = changed
            self._info = self._make_info()
            await (await self._zeroconf.async_update_service(self._info))

    def _make_info(self) -> AsyncServiceInfo:
        self._addresses = [self._address] if self._address else _advertised_addresses()
        return AsyncServiceInfo(
            self._kind.value,
            self._service_name,
            port=self._port,
            properties=self._txt,
            # Not the machine's host name: the addresses of two agents on it may differ.
            server=f"{instance_of(self._service_name, self._kind)}-{self._port}.local.",
            parsed_addresses=[each.partition("%")[0] for each in self._addresses],
            host_ttl=TTL,
            other_ttl=TTL,
        )

    async def _refuse_taken_name(self) -> None:
        """A record left by a machine that is gone does no harm: only the living answer."""
        record = await _ask(
            self._zeroconf.zeroconf, self._kind, self._service_name, self._fingerprint
        )
        if record is None:
            return
        taken = record.address
        if self._who_has is not None:
            taken = await self._who_has(self._name, record.addresses)
        if not taken:
            log.warning(
                "somebody at %s says to be %s and does not prove it: going on",
                *(", ".join(record.addresses), self._name),
            )
            return
        raise InputError(
            f"a machine named {self._name} is already in this cluster at {taken}: "
            "choose another --name"
        )


class Advertisements:
    """One Advertisement for each generation of the cluster, as they come and go."""

    def __init__(
        self, fingerprints: Callable[[], Sequence[str]], make: Callable[[str], Advertisement]
    ) -> None:
        self._fingerprints = fingerprints
        self._make = make
        self._running: dict[str, Advertisement] = {}
        self._txt: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        for fingerprint in self._fingerprints():
            self._running[fingerprint] = await self._make(fingerprint).__aenter__()
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        for advertisement in self._running.values():
            await advertisement.__aexit__(kind, error, trace)

    async def update(self, **txt: str) -> None:
        """Change TXT values in all of them."""
        self._txt |= txt
        for advertisement in list(self._running.values()):
            await advertisement.update(**txt)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_EVERY)
            with going_on("advertising for another token"):
                wanted = self._fingerprints()
                for fingerprint in wanted:
                    if fingerprint not in self._running:
                        advertisement = await self._make(fingerprint).__aenter__()
                        self._running[fingerprint] = advertisement
                        await advertisement.update(**self._txt)
                for fingerprint in self._running.keys() - set(wanted):
                    await self._running.pop(fingerprint).__aexit__(None, None, None)


class Browser:
    """Keeps `found`, by name, all machines of one cluster that are there now.

    async with Browser(Kind.NODE, fingerprint) as browser:
        await browser.wait_for(lambda found: len(found) >= 3, timeout=5)
    """

    def __init__(
        self, kind: Kind, fingerprint: str | Callable[[], Sequence[str]], *, host: str = ""
    ) -> None:
        """`fingerprint`: of the cluster, or those of all its generations, which may change.

        `host` limits the search to the network of that address of this machine.
        """
        self.found: dict[str, ServiceRecord] = {}
        self._kind = kind
        one = [fingerprint] if isinstance(fingerprint, str) else []
        self._fingerprints = (lambda: one) if isinstance(fingerprint, str) else fingerprint
        self._address = one_address(host)
        # By service name.
        self._known: set[str] = set()  # also those that don't answer, and other clusters'
        self._machines: dict[str, ServiceRecord] = {}
        self._condition = asyncio.Condition()
        self._stale: set[str] = set()
        self._refreshing: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._zeroconf = _open(self._address)
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf,
            [self._kind.value],
            handlers=[self._on_change],
            question_type=DNSQuestionType.QM,
        )
        self._poller = asyncio.create_task(self._poll())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._browser.async_cancel()
        tasks = [self._poller, *self._refreshing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._zeroconf.async_close()

    async def changed(self) -> None:
        """Return when a machine came, left, or said something new."""
        async with self._condition:
            await self._condition.wait()

    async def wait_for(
        self, predicate: Callable[[dict[str, ServiceRecord]], bool], timeout: float | None
    ) -> bool:
        """Whether `predicate(found)` came true within `timeout` seconds (None: no limit)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._condition:
                await self._condition.wait_for(lambda: predicate(self.found))
                return True
        return False

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._known.discard(name)
        else:
            self._known.add(name)
        self._refresh(name)

    async def _poll(self) -> None:
        """Answers come from the cache while they are fresh, so this is seldom a question."""
        while True:
            await asyncio.sleep(POLL_EVERY)
            with going_on("looking for machines"):
                await self._zeroconf.follow_interfaces()
                for name in self._known:
                    self._refresh(name)

    def _refresh(self, name: str) -> None:
        ours = tuple(f"-{short(fingerprint)}" for fingerprint in self._fingerprints())
        if not instance_of(name, self._kind).endswith(ours) and name not in self._machines:
            return  # another cluster's
        self._stale.add(name)
        if name not in self._refreshing:
            task = asyncio.create_task(self._look_up(name))
            self._refreshing[name] = task
            task.add_done_callback(lambda _: self._refreshing.pop(name))

    async def _look_up(self, name: str) -> None:
        while name in self._stale:
            self._stale.discard(name)
            machine = None
            with going_on(f"asking after {shown(name)}"):
                machine = await _ask(
                    self._zeroconf.zeroconf, self._kind, name, *self._fingerprints()
                )
            before = self._machines.pop(name, None)
            if machine is not None and name in self._known:  # after a goodbye it is not
                self._machines[name] = machine
            if self._machines.get(name) != before:
                self.found = {each.name: each for each in self._machines.values()}
                async with self._condition:
                    self._condition.notify_all()


class _Multicast(AsyncZeroconf):
    """mDNS on one address of this machine, or on its interfaces as they come and go."""

    def __init__(self, address: str) -> None:
        self._follows = not address
        self._used: list[str | int] = [address] if address else multicast_interfaces()
        version = IPVersion.All if self._follows and socket.has_dualstack_ipv6() else None
        super().__init__(interfaces=_usable(self._used, version), ip_version=version)

    async def follow_interfaces(self) -> None:
        """Uses interfaces that have come, and those no longer that have gone."""
        if not self._follows or (now := multicast_interfaces()) == self._used:
            return
        self._used = now
        version = IPVersion.All if socket.has_dualstack_ipv6() else None
        await self.async_update_interfaces(_usable(now, version))


def _usable(interfaces: list[str | int], version: IPVersion | None) -> list[str | int]:
    """Addresses that mDNS can use: none of IPv6 where this machine has none."""
    return [each for each in interfaces if version is not None or isinstance(each, str)]


def _open(address: str) -> _Multicast:
    try:
        return _Multicast(address)
    except (OSError, RuntimeError) as error:
        where = f" at {address}" if address else ""
        raise UnavailableError(f"mDNS can't start{where}: {error}: use --peer HOST:PORT") from error


def _advertised_addresses() -> list[str]:
    return own_addresses()[:MOST_ADDRESSES]


def one_address(host: str) -> str:
    """The IP address of `host`, or "" when it stands for all addresses of this machine."""
    if not host:
        return ""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        raise InputError(f"{host} is no address: choose another with --host") from None
    return "" if ipaddress.ip_address(address).is_unspecified else address


async def _ask(
    zeroconf: Zeroconf, kind: Kind, service_name: str, *fingerprints: str
) -> ServiceRecord | None:
    """The record of a service now; None when it doesn't answer, or not as it should."""
    info = AsyncServiceInfo(kind.value, service_name)
    # Multicast answers only: of several programs that listen to mDNS on one machine, the kernel
    # gives a unicast answer to just one.
    if not await info.async_request(zeroconf, ANSWER_WITHIN * 1000, DNSQuestionType.QM):
        return None
    try:
        endpoints = _endpoints(zeroconf, info)
        record = parse_record(kind, service_name, endpoints, info.properties)
    except ValueError as error:
        log.warning("ignoring the mDNS record %s: %s", shown(service_name), error)
        return None
    return record if record.fingerprint in fingerprints else None


def _endpoints(zeroconf: Zeroconf, info: AsyncServiceInfo) -> list[tuple[str, int]]:
    """Hosts and ports at which the service may be, the best for us first.

    Whoever says to be a service that is there already adds places to look for it, and takes
    none away. Raises ValueError for a host that is no address.
    """
    found = [(host, info.port or 0) for host in best_first(info.parsed_scoped_addresses())]
    for record in zeroconf.cache.get_all_by_details(info.name, _TYPE_SRV, _CLASS_IN):
        if isinstance(record, DNSService):
            hosts = [
                host
                for kind in (_TYPE_A, _TYPE_AAAA)
                for host in zeroconf.cache.get_all_by_details(record.server, kind, _CLASS_IN)
            ]
            known = [_text_of(host) for host in hosts if isinstance(host, DNSAddress)]
            found += [(host, record.port) for host in best_first(known)]
    return list(dict.fromkeys(found))


def _text_of(record: DNSAddress) -> str:
    """An IP address, with the link that it came over where it needs one."""
    ip = ipaddress.ip_address(record.address)
    is_scoped = ip.version == 6 and ip.is_link_local and record.scope_id is not None
    return f"{ip}%{record.scope_id}" if is_scoped else str(ip)
