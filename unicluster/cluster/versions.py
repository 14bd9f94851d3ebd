"""Which versions of unicluster work together, and which machine to upgrade when they don't."""

from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__


def mismatch(name: str, version: str, protocol: int, oldest: int = 0) -> str | None:
    """Why this process can't work with another one, or None if it can.

    `oldest` is the oldest protocol that the other still speaks; 0: only its own.
    """
    if protocol >= OLDEST_PROTOCOL and (oldest or protocol) <= PROTOCOL:
        return None
    older = "this machine" if protocol > PROTOCOL else name
    return (
        f"{name} runs unicluster {version or 'unknown'} (protocol {protocol}), this machine "
        f"{__version__} (protocol {PROTOCOL}), and they don't work together: upgrade {older}"
    )
