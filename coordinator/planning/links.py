"""Links between machines, and how long a hop over one takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from unicluster.errors import InputError

GBIT = 1e9 / 8


@dataclass(frozen=True)
class Link:
    """A link between two machines: seconds before the first byte, and bytes per second."""

    name: str
    latency_s: float
    bytes_per_s: float
    measured: bool = False

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.bytes_per_s


# TCP between two Macs takes about 0.3 ms, over Ethernet and Thunderbolt alike, until it is
# measured; the packing of a frame is within that. Thunderbolt carries IP at about half its rate.
TCP_S = 0.3e-3
LINKS = {
    link.name: link
    for link in (
        Link("1gbe", TCP_S, 1 * GBIT),
        Link("2.5gbe", TCP_S, 2.5 * GBIT),
        Link("5gbe", TCP_S, 5 * GBIT),
        Link("10gbe", TCP_S, 10 * GBIT),
        Link("tb4", TCP_S, 20 * GBIT),
        Link("tb5", TCP_S, 40 * GBIT),
    )
}
# Between machines whose ports are unknown.
LAN = Link("LAN", TCP_S, 10 * GBIT)


def find(name: str) -> Link:
    """The link of that name. Raises InputError listing them."""
    if link := LINKS.get(name.strip().lower()):
        return link
    raise InputError(f"no link {name!r}: it is one of {', '.join(LINKS)}")


@dataclass(frozen=True)
class Network:
    """The links between machines, by their names.

    pairs: links between two. default: between all others; None: the slower of the two ports.
    """

    default: Link | None = None
    pairs: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def between(self, one: str, other: str, ports: tuple[str, str] = ("", "")) -> Link:
        """The link between two machines; `ports` name the fastest network port of each."""
        if link := self.pairs.get(frozenset((one, other))):
            return link
        known = [LINKS[port] for port in ports if port in LINKS]
        return self.default or min(known, key=lambda link: link.bytes_per_s, default=LAN)
