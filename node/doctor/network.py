"""Checks of `unicluster doctor` on the network: multicast, reachability, clocks, links."""

import asyncio
import ipaddress
import platform
import socket
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import grpc
import psutil

from node.doctor import certificates
from node.doctor.finding import Finding, Level
from node.doctor.multicast import judge, listen, local_network
from unicluster import __version__
from unicluster.cluster.channels import as_error, split_address
from unicluster.cluster.discovery import Browser, one_address
from unicluster.cluster.interfaces import interfaces
from unicluster.cluster.records import Kind, ServiceRecord, valid_addresses
from unicluster.cluster.versions import mismatch
from unicluster.dialing.dialer import Dialer
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.identity import default_name
from unicluster.trust.keyring import Keyring, Membership
from unicluster.v1.node_pb2 import DescribeNodeRequest, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeStub

LISTEN_SECONDS = 4.0
ANSWER_SECONDS = 5.0
TRIPS = 7
# A hop that takes longer than this costs more than most layers do.
SLOW_SECONDS = 0.005
SLOW_MBIT = 1000
# Certificates have a day's grace.
CLOCK_WARNING, CLOCK_ERROR = 30.0, 20 * 3600.0


@dataclass(frozen=True)
class Answer:
    """A machine that was asked. Seconds; `ahead`: of its clock, before ours."""

    info: NodeInfo
    address: str
    round_trip: float
    ahead: float


async def examine(membership: Membership, peers: Sequence[str], host: str) -> list[Finding]:
    """Listens for a few seconds and asks everybody who is heard or named."""
    identity = Keyring.of_member(membership, default_name()).current
    fingerprints = membership.fingerprints
    async with (
        Browser(Kind.NODE, lambda: fingerprints, host=host) as browser,
        Browser(Kind.CHAT, lambda: fingerprints, host=host) as gateways,
    ):
        by_interface, _ = await asyncio.gather(
            listen(fingerprints[0], one_address(host)), asyncio.sleep(LISTEN_SECONDS)
        )
        heard = dict(browser.found)
        ports = {each.address: f"serve at {each.address}" for each in gateways.found.values()}
    findings: list[Finding] = []
    dialer = Dialer(identity)
    answers: dict[str, Answer] = {}
    waiting = {(m.name, m.addresses) for m in heard.values()} | {("", (peer,)) for peer in peers}
    asked: set[str] = set()
    while waiting:
        asked |= {address for _, addresses in waiting for address in addresses}
        asking = sorted(waiting)
        answered = await asyncio.gather(*(_ask(*each, dialer) for each in asking))
        for (name, addresses), answer in zip(asking, answered, strict=True):
            if isinstance(answer, Answer):
                answers.setdefault(answer.info.name, answer)
            else:
                findings.append(_silent(name or addresses[0], addresses[0], answer))
        known = {
            (each.name, tuple(valid_addresses(each.addresses)))
            for answer in answers.values()
            for each in answer.info.known
        }
        waiting = {
            (name, addresses)
            for name, addresses in known
            if addresses and name not in answers and not asked >= set(addresses)
        }
    here = _here(heard.values())
    ports |= {answer.address: answer.info.name for answer in answers.values()}
    return [
        *certificates.authorities(membership),
        *await certificates.shown(ports, identity),
        multicast(heard, answers),
        *judge(by_interface, here),
        *local_network(by_interface, here, sys.platform, platform.mac_ver()[0]),
        *findings,
        *(f for a in answers.values() for f in examine_one(a)),
    ]


def _here(heard: Iterable[ServiceRecord]) -> dict[str, set[str]]:
    """The agents on this machine, all of whose addresses are its own: names, and those."""
    own = {each.address for each in interfaces()}
    hosts = {
        record.name: {split_address(a)[0].partition("%")[0] for a in record.addresses}
        for record in heard
    }
    return {name: at for name, at in hosts.items() if own >= at}


def multicast(heard: Collection[str], answers: dict[str, Answer]) -> Finding:
    """Whether mDNS brings all machines that are there."""
    unheard = sorted({answer.info.name for answer in answers.values()} - set(heard))
    if unheard:
        return Finding(
            Level.WARNING,
            "multicast",
            f"{', '.join(unheard)} answers but is not heard: multicast is blocked on the way",
            "allow UDP 5353 to 224.0.0.251 on both, switch off IGMP snooping or client isolation "
            "in the switch or access point, or go on with --peer HOST:PORT",
        )
    if not heard:
        return Finding(
            Level.ERROR,
            "multicast",
            "no agent of this cluster is heard, not even one on this machine",
            "run `unicluster join` here and on the others; if they run: `doctor --peer HOST:PORT`",
        )
    return Finding(Level.OK, "multicast", f"heard {', '.join(sorted(heard))}")


def examine_one(answer: Answer) -> list[Finding]:
    """Version, clock, and speed of one machine that answered."""
    info, who = answer.info, answer.info.name
    findings = []
    wrong = mismatch(f"machine {who}", info.version, info.protocol, info.oldest_protocol)
    if wrong:
        findings.append(Finding(Level.ERROR, "version", wrong, "then start its agent again"))
    elif info.version != __version__:
        message = f"{who} runs {info.version}, this machine {__version__}: they work together"
        findings.append(Finding(Level.OK, "version", message))
    if info.clock and abs(answer.ahead) > CLOCK_WARNING:
        direction = "ahead of" if answer.ahead > 0 else "behind"
        findings.append(
            Finding(
                Level.ERROR if abs(answer.ahead) > CLOCK_ERROR else Level.WARNING,
                "clock",
                f"{who}'s clock is {abs(answer.ahead):.0f} s {direction} this machine's",
                "switch on NTP on both: certificates allow a day at most",
            )
        )
    findings.append(_link(answer))
    return findings


def _link(answer: Answer) -> Finding:
    who, host = answer.info.name, split_address(answer.address)[0]
    nic, speed = _interface_to(host)
    took = f"{answer.round_trip * 1000:.1f} ms"
    if answer.round_trip > SLOW_SECONDS:
        return Finding(
            Level.WARNING,
            "link",
            f"{who} at {host} takes {took} to answer over {nic}",
            "a cable instead of Wi-Fi; if there is one, see that its addresses are on one network",
        )
    if 0 < speed < SLOW_MBIT:
        return Finding(
            Level.WARNING,
            "link",
            f"{who} at {host} is reached over {nic}, which runs at {speed} Mbit/s",
            "another cable, port or switch: a gigabit is the least",
        )
    if better := _faster_than(nic, speed):
        return Finding(
            Level.WARNING,
            "link",
            f"{who} is reached over {nic} ({speed} Mbit/s), though {better} is faster",
            f"give {better} an address on both machines in one network of its own, and "
            "`join --host` that address if the other is still chosen",
        )
    return Finding(Level.OK, "link", f"{who} at {host} over {nic}, {took}")


async def _ask(name: str, addresses: tuple[str, ...], dialer: Dialer) -> Answer | UniclusterError:
    """A machine's answer, or why there is none. An empty name: whoever is there."""
    try:
        who = f"agent {name}" if name else f"agent {addresses[0]}"
        reached = await dialer.reach(addresses, who, name=name)
        async with dialer.connect(reached) as channel:
            began = time.time()
            info = await NodeStub(channel).Describe(DescribeNodeRequest(), timeout=ANSWER_SECONDS)
            took = time.time() - began
        trips = [await _round_trip(reached.address) for _ in range(TRIPS)]
    except UniclusterError as error:
        return error
    except grpc.aio.AioRpcError as error:
        return as_error(error, f"agent {reached.address}")
    except OSError as error:
        return UnavailableError(f"agent {reached.address}: {error.strerror}")
    return Answer(info, reached.address, min(trips), info.clock - began - took / 2)


async def _round_trip(address: str) -> float:
    """Seconds of a TCP handshake, which contain none of the agent's work."""
    began = time.perf_counter()
    _, writer = await asyncio.open_connection(*split_address(address))
    took = time.perf_counter() - began
    writer.close()
    return took


def _silent(name: str, address: str, error: UniclusterError) -> Finding:
    port = split_address(address)[1]
    return Finding(
        Level.ERROR,
        "reach",
        str(error),
        f"on {name}: is the agent running, and does its firewall let TCP {port} and {port + 1} in?",
    )


def _interface_to(host: str) -> tuple[str, int]:
    """The interface that leads to `host`, and its Mbit/s (0: not known)."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return "an unknown interface", 0
    for nic, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in entries):
            loopback = ipaddress.ip_address(own).is_loopback
            return nic, 0 if loopback else psutil.net_if_stats()[nic].speed
    return "an unknown interface", 0


def _faster_than(nic: str, speed: int) -> str:
    """An interface that is up and at least twice as fast; empty if there is none."""
    if speed <= 0:
        return ""
    others = {n: s.speed for n, s in psutil.net_if_stats().items() if s.isup and n != nic}
    best = max(others, key=lambda name: others[name], default="")
    return best if best and others[best] >= 2 * speed else ""
