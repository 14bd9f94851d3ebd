"""Addresses of this machine, and which addresses of another one are best to reach it at."""

import contextlib
import ipaddress
import re
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import psutil

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

SYSFS = Path("/sys/class/net")
MEMBERSHIPS = Path("/proc/sys/net/ipv4/igmp_max_memberships")
DEFAULT_MEMBERSHIPS = 20
# Of a host's interfaces, those that multicast is sent to, each over a socket of its own.
MOST_INTERFACES = 32
# Whose IPv6 addresses of the link are used: each may be tried on each of another machine's.
MOST_LINKS = 8
# A host of many containers takes a while to list its interfaces.
FRESH_SECONDS = 0.5

# Where the kernel does not say what an interface is.
_INNER = re.compile(
    r"docker|veth|br-|virbr|vmnet|bridge1\d\d|cni|lxc|lxd|podman|awdl|llw|anpi|ap\d"
)
_TUNNEL = re.compile(r"utun|tun|tap|wg|ppp|ipsec|tailscale|zt|gif|stf|sit|gre")
_PORT = re.compile(r"en|eth|wl|bond|team|bridge\d\d?$|thunderbolt")

# Nobody's addresses (RFC 5737, RFC 3849): the way to them is the default route.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class Rank(IntEnum):
    """How much an interface matters to other machines, the most first."""

    DEFAULT_ROUTE = 0
    PORT = 1  # a physical one, or a bridge or bond of some
    LOOPBACK = 2
    OTHER = 3  # a container's end of a link, a VPN
    INNER = 4  # a bridge that only containers and virtual machines of this host hang on


@dataclass(frozen=True)
class Interface:
    """One address of an interface that is up and has a carrier.

    address: without a scope. speed: Mbit/s; 0: not known.
    """

    name: str
    index: int
    address: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    speed: int
    rank: Rank

    @property
    def ip(self) -> IPAddress:
        return ipaddress.ip_address(self.address)

    @property
    def is_local(self) -> bool:
        """Whether it is an IPv6 address of the link, which means nothing without a scope."""
        return self.ip.version == 6 and self.ip.is_link_local


def interfaces() -> list[Interface]:
    """This machine's addresses, in the order in which others should try them."""
    global _listed
    now = time.monotonic()
    if now - _listed[0] > FRESH_SECONDS:
        _listed = now, _list()
    return _listed[1]


_listed: tuple[float, list[Interface]] = (float("-inf"), [])


def _list() -> list[Interface]:
    speeds = {nic: state.speed for nic, state in psutil.net_if_stats().items() if state.isup}
    ways_out = _addresses_of_default_routes()
    found = []
    for nic, entries in psutil.net_if_addrs().items():
        if nic not in speeds:
            continue
        rank = _rank(nic, any(entry.address in ways_out for entry in entries))
        with contextlib.suppress(OSError):  # it has gone meanwhile
            index = socket.if_nametoindex(nic)
            for entry in entries:
                if entry.family in (socket.AF_INET, socket.AF_INET6):
                    host = entry.address.partition("%")[0]
                    network = _network(host, entry.netmask)
                    found.append(Interface(nic, index, host, network, speeds[nic], rank))
    return sorted(found, key=lambda each: (each.rank, each.is_local, each.ip.version, -each.speed))


def own_addresses() -> list[str]:
    """Addresses of this machine that others may reach, without scopes, the best first."""
    outer = [each for each in interfaces() if not _is_inner(each)]
    addresses = [each.address for each in outer if not each.is_local]
    addresses += [each.address for each in outer if each.is_local][:MOST_LINKS]
    return list(dict.fromkeys(addresses)) or ["127.0.0.1"]


def multicast_interfaces() -> list[str | int]:
    """Interfaces for mDNS: an IPv4 address of each, and the index of each that has IPv6.

    A socket may be in a limited number of multicast groups, so that those that matter come first,
    and those that do not fit are left out.
    """
    limit = min(MOST_INTERFACES, _memberships())
    by_address: dict[str, str] = {}
    by_index: dict[str, int] = {}
    for each in interfaces():
        if each.ip.version == 4:
            by_address.setdefault(each.name, each.address)
        elif each.is_local:
            by_index.setdefault(each.name, each.index)
    return [*list(by_address.values())[:limit], *list(by_index.values())[:limit]]


# How good the way to an address is: whether it is on no network of this machine, the rank and the
# negative speed of the interface, and whether it is for one link only.
Way = tuple[bool, int, int, bool, int]


def ways(addresses: Iterable[str]) -> dict[str, tuple[str, Way]]:
    """IP addresses of another machine as they are dialled from here, with what each comes from.

    An IPv6 address of a link that comes without a scope is dialled on each of this machine's links.
    """
    here = interfaces()
    own = {each.address for each in here}
    found: dict[str, tuple[str, Way]] = {}
    for address in addresses:
        for scoped in _with_scopes(address, here):
            found.setdefault(scoped, (address, _way(scoped, here, own)))
    return found


def best_first(addresses: Iterable[str]) -> list[str]:
    """IP addresses of another machine as they are dialled, the best way first.

    Those on a network of this machine come first, and of these the fastest network's.
    """
    found = ways(addresses)
    return sorted(found, key=lambda each: found[each][1])


def _way(address: str, here: list[Interface], own: set[str]) -> Way:
    host, _, link = address.partition("%")
    ip = ipaddress.ip_address(host)
    near = [
        each
        for each in here
        if ip in each.network and host not in own and link in ("", each.name, str(each.index))
    ]
    best = min(near, key=lambda each: (each.rank, -each.speed), default=None)
    is_local = ip.version == 6 and ip.is_link_local
    if best is None:
        return (True, Rank.INNER, 0, is_local, ip.version)
    return (False, best.rank, -best.speed, is_local, ip.version)


def _with_scopes(address: str, here: list[Interface]) -> list[str]:
    ip = ipaddress.ip_address(address)
    if ip.version == 4 or not ip.is_link_local:
        return [address]
    host, _, link = address.partition("%")
    if link:  # mDNS counts links, people name them
        return [f"{host}%{next((i.name for i in here if str(i.index) == link), link)}"]
    links = dict.fromkeys(each.name for each in here if each.is_local and not _is_inner(each))
    return [f"{address}%{link}" for link in list(links)[:MOST_LINKS]]


def _is_inner(interface: Interface) -> bool:
    return interface.rank in (Rank.LOOPBACK, Rank.INNER)


def _rank(nic: str, leads_out: bool) -> Rank:
    if nic == "lo" or re.fullmatch(r"lo\d+", nic):
        return Rank.LOOPBACK
    if leads_out:
        return Rank.OTHER if _TUNNEL.match(nic) else Rank.DEFAULT_ROUTE
    if sys.platform == "linux" and SYSFS.is_dir():
        if _is_physical(nic):
            return Rank.PORT
        is_bridge = (SYSFS / nic / "bridge").is_dir()
        return Rank.INNER if is_bridge or _INNER.match(nic) else Rank.OTHER
    if _INNER.match(nic):
        return Rank.INNER
    return Rank.PORT if _PORT.match(nic) else Rank.OTHER


def _is_physical(nic: str, depth: int = 4) -> bool:
    """Whether it is a port, or a bridge, bond or VLAN over one."""
    folder = SYSFS / nic
    if (folder / "device").exists():
        return True
    below = [each.name.removeprefix("lower_") for each in folder.glob("lower_*")]
    return depth > 0 and any(_is_physical(name, depth - 1) for name in below)


def _addresses_of_default_routes() -> set[str]:
    """Addresses from which packets for the rest of the world leave this machine."""
    found = set()
    for family, target in _ELSEWHERE:
        with (
            contextlib.suppress(OSError),
            socket.socket(family, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((target, 9))  # sends nothing
            found.add(probe.getsockname()[0])
    return found


def _network(host: str, netmask: str | None) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    mask = int(ipaddress.ip_address(netmask)) if netmask else 0
    return ipaddress.ip_network((host, mask.bit_count()), strict=False)


def _memberships() -> int:
    """How many multicast groups a socket may be in, by IPv4."""
    if sys.platform != "linux":
        return MOST_INTERFACES
    try:
        return max(1, int(MEMBERSHIPS.read_text()))
    except (OSError, ValueError):
        return DEFAULT_MEMBERSHIPS
