"""Checks of `unicluster doctor` on multicast: who is heard over each interface that matters.

mDNS of one program hears what arrives over any interface on which any program listens, and so is
content as long as it hears itself. Here each interface has a socket of its own, that hears nothing
else.
"""

import asyncio
import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from zeroconf import (  # type: ignore[attr-defined]  # exported, but not in __all__
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
)

from node.doctor.finding import Finding, Level
from unicluster.cluster.interfaces import MOST_LINKS, Interface, Rank, interfaces
from unicluster.cluster.records import Kind, instance_of, short

PORT = 5353
GROUP, GROUP6 = "224.0.0.251", "ff02::fb"
ROUNDS, ROUND_SECONDS = 3, 1.0
_QUERY, _PTR, _CLASS_IN = 0, 12, 1
_MOST_BYTES = 9000
# linux/in.h; elsewhere a socket hears only the interfaces that it joined.
_IP_MULTICAST_ALL, _IPV6_MULTICAST_ALL = 49, 29
# From this version on macOS asks before a program may use the local network.
PERMISSION_SINCE = 15
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM}


@dataclass(frozen=True)
class Heard:
    """Names of the agents whose answers came over one interface. problem: why none could."""

    interface: Interface
    names: frozenset[str]
    problem: OSError | None = None


async def listen(fingerprint: str, host: str = "") -> list[Heard]:
    """Asks for the cluster's agents over each interface that matters, or that of `host`."""
    usable = [each for each in interfaces() if each.ip.version == 4 or each.is_local]
    if host:
        chosen = [each for each in usable if each.address == host.partition("%")[0]]
    else:
        ports = [each for each in usable if each.rank <= Rank.PORT]
        chosen = ports or [each for each in usable if each.rank is Rank.OTHER]
    found: dict[str, Interface] = {}
    for each in chosen:
        found.setdefault(each.name, each)
    some = list(found.values())[:MOST_LINKS]
    return list(await asyncio.gather(*(_listen(each, fingerprint) for each in some)))


def judge(heard: Sequence[Heard], here: Mapping[str, Collection[str]]) -> list[Finding]:
    """here: the agents on this machine, by name, each with the hosts of its addresses.

    Each must be heard over the interfaces of these.
    """
    findings = []
    for each in heard:
        local = {name for name, hosts in here.items() if each.interface.address in hosts}
        where = f"{each.interface.name} ({each.interface.address})"
        if each.problem is not None:
            reason = each.problem.strerror or str(each.problem)
            findings.append(
                Finding(
                    Level.ERROR,
                    "multicast",
                    f"nothing can be sent over {where}: {reason.lower()}",
                    "let this program use the network: is a firewall in the way?",
                )
            )
        elif missing := sorted(local - each.names):
            findings.append(
                Finding(
                    Level.ERROR,
                    "multicast",
                    f"this machine's own {', '.join(missing)} is not heard over {where}, so that "
                    "no machine there hears it either",
                    "allow UDP 5353 in and out, start the agent again; with many bridges: "
                    "sudo sysctl net.ipv4.igmp_max_memberships=1024",
                )
            )
        elif each.names:
            others = sorted(each.names - set(here))
            who = ", ".join(others) if others else "this machine only"
            findings.append(Finding(Level.OK, "multicast", f"heard over {where}: {who}"))
    return findings


def local_network(
    heard: Sequence[Heard], here: Collection[str], system: str, version: str
) -> list[Finding]:
    """On macOS: whether the permission for the local network may be what is missing.

    system: as sys.platform. version: of macOS, as "15.1".
    """
    major = version.partition(".")[0]
    if system != "darwin" or not major.isdigit() or int(major) < PERMISSION_SINCE:
        return []
    blocked = any(h.problem is not None and h.problem.errno in _UNREACHABLE for h in heard)
    if not blocked and any(each.names - set(here) for each in heard):
        return []
    return [
        Finding(
            Level.ERROR if blocked else Level.WARNING,
            "privacy",
            f"macOS {version} "
            + ("keeps this program off the local network" if blocked else "may keep it to itself"),
            "System Settings > Privacy & Security > Local Network: allow the terminal or app that "
            "runs this; an agent as a service: a daemon in /Library/LaunchDaemons needs no "
            "permission, a LaunchAgent is never asked (deploy/README.md)",
        )
    ]


async def _listen(interface: Interface, fingerprint: str) -> Heard:
    names: set[str] = set()
    try:
        with _socket_on(interface) as listening:
            for _ in range(ROUNDS):
                _ask(listening, interface)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ROUND_SECONDS):
                        while True:
                            loop = asyncio.get_running_loop()
                            data = await loop.sock_recv(listening, _MOST_BYTES)
                            names |= _names(data, fingerprint)
    except OSError as error:
        return Heard(interface, frozenset(names), error)
    return Heard(interface, frozenset(names))


def _socket_on(interface: Interface) -> socket.socket:
    """A socket that hears multicast of one interface only."""
    is_6 = interface.ip.version == 6
    made = socket.socket(socket.AF_INET6 if is_6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        level = socket.IPPROTO_IPV6 if is_6 else socket.IPPROTO_IP
        if sys.platform == "linux":
            made.setsockopt(level, _IPV6_MULTICAST_ALL if is_6 else _IP_MULTICAST_ALL, 0)
        if is_6:
            made.setsockopt(level, socket.IPV6_V6ONLY, 1)
            index = struct.pack("@I", interface.index)
            made.bind(("::", PORT))
            made.setsockopt(level, socket.IPV6_MULTICAST_IF, index)
            group = socket.inet_pton(socket.AF_INET6, GROUP6)
            made.setsockopt(level, socket.IPV6_JOIN_GROUP, group + index)
        else:
            address = socket.inet_aton(interface.address)
            made.bind(("", PORT))
            made.setsockopt(level, socket.IP_MULTICAST_IF, address)
            made.setsockopt(level, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + address)
    except BaseException:
        made.close()
        raise
    return made


def _ask(asking: socket.socket, interface: Interface) -> None:
    out = DNSOutgoing(_QUERY)
    out.add_question(DNSQuestion(Kind.NODE.value, _PTR, _CLASS_IN))
    is_6 = interface.ip.version == 6
    target = (GROUP6, PORT, 0, interface.index) if is_6 else (GROUP, PORT)
    for packet in out.packets():
        asking.sendto(packet, target)


def _names(data: bytes, fingerprint: str) -> set[str]:
    """Names of the cluster's agents in an mDNS packet."""
    packet = DNSIncoming(data)
    if not packet.valid or packet.is_query():
        return set()
    ending = f"-{short(fingerprint)}"
    instances = {
        instance_of(answer.alias, Kind.NODE)
        for answer in packet.answers()
        if isinstance(answer, DNSPointer) and answer.name == Kind.NODE.value
    }
    return {each.removesuffix(ending) for each in instances if each.endswith(ending)}
