"""Greetings of agents, parsed strictly: a member may say anything, and in any name."""

from collections.abc import Sequence
from dataclasses import dataclass

from unicluster.cluster.channels import join_address, without_scope
from unicluster.cluster.records import MOST_ADDRESSES, is_valid_ip, valid_addresses
from unicluster.errors import InputError, shown
from unicluster.trust.identity import check_name
from unicluster.v1.node_pb2 import Greeting

MOST_VERSION_CHARACTERS = 64
MOST_PROTOCOL = 1 << 16


@dataclass(frozen=True)
class ParsedGreeting:
    """Another agent's own words, checked.

    name: of its certificate. addresses: "host:port" under which it may be, that first at which it
    listens or from which it calls.
    """

    name: str
    addresses: tuple[str, ...]
    version: str
    protocol: int
    oldest: int


def greeting_of(
    port: int, host: str, addresses: Sequence[str], version: str, protocol: int, oldest: int
) -> Greeting:
    """The greeting of an agent that listens at `host` ("": everywhere), one that is accepted."""
    said = dict.fromkeys(without_scope(address) for address in addresses)
    return Greeting(
        port=port,
        host=host,
        version=version,
        protocol=protocol,
        oldest_protocol=oldest,
        addresses=list(said)[:MOST_ADDRESSES],
    )


def parse_greeting(greeting: Greeting, name: str, caller: str) -> ParsedGreeting:
    """Reads a greeting. Raises InputError where anything about it is invalid.

    name: that of the caller's certificate. caller: the IP address that it calls from.
    """
    check_name(name)
    if not 0 < greeting.port < 65536:
        raise InputError(f"greeting of {name}: port {greeting.port}: between 1 and 65535")
    if greeting.host and not is_valid_ip(greeting.host):
        raise InputError(f"greeting of {name}: host: invalid: {shown(greeting.host)}")
    if len(greeting.version) > MOST_VERSION_CHARACTERS or not greeting.version.isprintable():
        raise InputError(f"greeting of {name}: version: invalid: {shown(greeting.version)}")
    if not greeting.oldest_protocol <= greeting.protocol < MOST_PROTOCOL:
        raise InputError(
            f"greeting of {name}: protocol {greeting.protocol}, "
            f"oldest {greeting.oldest_protocol}: invalid"
        )
    if len(greeting.addresses) > MOST_ADDRESSES:
        raise InputError(
            f"greeting of {name}: {len(greeting.addresses)} addresses, and at most "
            f"{MOST_ADDRESSES} are accepted"
        )
    others = valid_addresses(greeting.addresses)
    if len(others) != len(greeting.addresses):
        (wrong, *_) = [a for a in greeting.addresses if not valid_addresses([a])] or ["twice one"]
        raise InputError(f"greeting of {name}: addresses: invalid: {shown(wrong)}")
    # A scope is a name on the caller's side: here, what it calls from says the same.
    host = caller if not greeting.host or "%" in greeting.host else greeting.host
    first = join_address(host, greeting.port)
    return ParsedGreeting(
        name,
        tuple(dict.fromkeys([first, *others])),
        greeting.version,
        greeting.protocol,
        greeting.oldest_protocol,
    )
