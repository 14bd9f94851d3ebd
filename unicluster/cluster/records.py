"""mDNS records of machines and front doors, parsed strictly: anybody on the network can send one.

A record is a hint of where somebody may be. Who is there is known when TLS has proven it.
"""

import ipaddress
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from unicluster.cluster.channels import join_address, split_address
from unicluster.errors import InputError, shown
from unicluster.trust.identity import check_name

MOST_ADDRESSES = 32
MOST_SAID = 256  # that are looked at
MOST_PROPERTIES = 32
MOST_CHARACTERS = 255
MOST_DIGITS = 18

_LINK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,31}")  # the name or index of an interface


class Kind(Enum):
    """Kinds of services; the value is the mDNS service type."""

    NODE = "_unicluster._tcp.local."
    CHAT = "_unicluster-chat._tcp.local."


@dataclass(frozen=True)
class ServiceRecord:
    """A service's own description. Memory is in bytes.

    addresses: "host:port" or "[host]:port". oldest: the oldest protocol that it still works with;
    0: only its own. txt: all of its TXT record.
    """

    name: str
    fingerprint: str
    addresses: tuple[str, ...]
    memory: int = 0
    usable: int = 0
    chip: str = ""
    backend: str = ""
    version: str = ""
    protocol: int = 0
    oldest: int = 0
    txt: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return self.addresses[0]


def short(fingerprint: str) -> str:
    """The part of a cluster's fingerprint that is in its services' names."""
    return fingerprint[:8]


def service_name_of(kind: Kind, name: str, fingerprint: str) -> str:
    """Two clusters on a network may each have a machine of that name."""
    return f"{name}-{short(fingerprint)}.{kind.value}"


def instance_of(service_name: str, kind: Kind) -> str:
    """The first label of a service's name."""
    return service_name.removesuffix(f".{kind.value}")


def parse_record(
    kind: Kind,
    service_name: str,
    endpoints: Sequence[tuple[str, int]],
    properties: Mapping[bytes, bytes | None],
) -> ServiceRecord:
    """The record of a service. Raises ValueError where anything about it is invalid.

    endpoints: IP addresses, with a scope after "%" where IPv6 needs one, each with its port. Of
    these, those that are invalid are left out, if any other is valid.
    """
    addresses = [join_address(host, port) for host, port in endpoints if _is_valid(host, port)]
    if not addresses:
        raise ValueError("it has no valid address")
    if len(properties) > MOST_PROPERTIES:
        raise ValueError(f"{len(properties)} properties, and at most {MOST_PROPERTIES} are valid")
    txt = {_text(key): _text(value or b"") for key, value in properties.items()}
    try:
        name = check_name(txt.get("name", ""))
    except InputError as error:
        raise ValueError(str(error)) from error
    fingerprint = txt.get("cluster", "")
    if service_name.lower() != service_name_of(kind, name, fingerprint).lower():
        raise ValueError(f"it names {name} in cluster {fingerprint or 'unknown'}, whose it is not")
    return ServiceRecord(
        name=name,
        fingerprint=fingerprint,
        addresses=tuple(dict.fromkeys(addresses))[:MOST_ADDRESSES],
        memory=_number(txt, "memory"),
        usable=_number(txt, "usable"),
        chip=txt.get("chip", ""),
        backend=txt.get("backend", ""),
        version=txt.get("version", ""),
        protocol=_number(txt, "protocol"),
        oldest=_number(txt, "oldest"),
        txt=txt,
    )


def valid_addresses(addresses: Iterable[str]) -> list[str]:
    """The addresses of another machine, as it or somebody says, without those that can't be."""
    found: dict[str, None] = {}
    for address in itertools.islice(addresses, MOST_SAID):
        if is_address(address) and _is_valid(*split_address(address)):
            found[join_address(*split_address(address))] = None
    return list(found)[:MOST_ADDRESSES]


def is_address(text: str) -> bool:
    """Whether somebody's words are an address: HOST:PORT, of which the host may be a name."""
    try:
        host, _ = split_address(text)
    except InputError:
        return False
    return len(text) <= MOST_CHARACTERS and text.isprintable() and not set(host) & set(" /\\")


def is_valid_ip(host: str) -> bool:
    """Whether `host` is an IP address that some machine may have."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    link = host.partition("%")[2]
    is_scoped = not link or _LINK.fullmatch(link) is not None
    return is_scoped and not ip.is_unspecified and not ip.is_multicast


def _is_valid(host: str, port: int) -> bool:
    return 0 < port < 65536 and is_valid_ip(host)


def _text(value: bytes) -> str:
    text = value.decode()  # a UnicodeDecodeError is a ValueError
    if len(text) > MOST_CHARACTERS or not text.isprintable():
        raise ValueError(f"invalid text {shown(text)}")
    return text


def _number(txt: Mapping[str, str], key: str) -> int:
    text = txt.get(key, "") or "0"
    if len(text) > MOST_DIGITS or not text.isascii() or not text.isdigit():
        raise ValueError(f"invalid number {key}={shown(text)}")
    return int(text)
