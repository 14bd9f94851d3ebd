"""News of machines as multicast tells of them: reasons to plan again at once."""

from collections.abc import Mapping

from unicluster.cluster.records import ServiceRecord

# The least growth of what a machine offers that may make room for a stage.
GROWTH = 1.1


def has_changed(before: Mapping[str, ServiceRecord], now: Mapping[str, ServiceRecord]) -> bool:
    """Whether a machine came, went, is elsewhere (so its agent started anew), or offers more."""
    if before.keys() != now.keys():
        return True
    return any(
        set(record.addresses) != set(before[name].addresses)
        or record.usable > GROWTH * before[name].usable
        for name, record in now.items()
    )
