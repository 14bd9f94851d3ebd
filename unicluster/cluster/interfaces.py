"""Addresses of this machine, and which addresses of another one are best to reach it at."""

import ipaddress
import re
import socket
from dataclasses import dataclass

import psutil

# Bridges that containers and virtual machines hang on; the same addresses are on every machine.
_INNER_BRIDGES = re.compile(r"docker|veth|br-|virbr|vmnet|bridge100")


@dataclass(frozen=True)
class _Interface:
    """One address of this machine."""

    address: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    speed: int  # Mbit/s; 0: not known


def _interfaces() -> list[_Interface]:
    """This machine's addresses, loopback and link-local IPv6 ones excluded, the fastest first."""
    speeds = {nic: state.speed for nic, state in psutil.net_if_stats().items() if state.isup}
    interfaces = []
    for nic, entries in psutil.net_if_addrs().items():
        if nic not in speeds or _INNER_BRIDGES.match(nic):
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or "%" in entry.address:
                continue
            address = ipaddress.ip_address(entry.address)
            if address.is_loopback or (address.version == 6 and address.is_link_local):
                continue
            mask = int(ipaddress.ip_address(entry.netmask)) if entry.netmask else 0
            network = ipaddress.ip_network((entry.address, mask.bit_count()), strict=False)
            interfaces.append(_Interface(entry.address, network, speeds[nic]))
    return sorted(interfaces, key=lambda each: (each.network.version, -each.speed))


def own_addresses() -> list[str]:
    """Addresses of this machine that others may reach, the fastest first."""
    return [each.address for each in _interfaces()] or ["127.0.0.1"]


def best_first(addresses: list[str]) -> list[str]:
    """`addresses`, those on a network of this machine first, and of these the fastest network's."""
    interfaces = _interfaces()
    own = {each.address for each in interfaces}

    def rank(address: str) -> tuple[bool, int, int]:
        ip = ipaddress.ip_address(address)
        speeds = [each.speed for each in interfaces if ip in each.network and address not in own]
        return (not speeds, -max(speeds, default=0), ip.version)

    return sorted(addresses, key=rank)
