"""TLS of the HTTP door: by a certificate of one's own, or by one of the cluster's authority."""

import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unicluster.cluster.interfaces import own_addresses
from unicluster.errors import InputError
from unicluster.trust.identity import Identity, default_name
from unicluster.trust.keyring import Keyring, Membership

# In place of a file: the cluster's authority issues the certificate.
CLUSTER = Path("cluster")
LOCAL = ("localhost", "127.0.0.1", "::1")


def tls_of(file: Path) -> ssl.SSLContext:
    """TLS with the certificate and the key in a PEM file. Raises InputError where it has none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Else OpenSSL would ask on the terminal for the password of an encrypted key.
        context.load_cert_chain(file, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = "no certificate with its key, unencrypted, in PEM"
        if not isinstance(error, ssl.SSLError) and isinstance(error, OSError):
            reason = error.strerror or reason
        raise InputError(f"--http-cert {file}: {reason}") from None
    return context


def names_here(further: Iterable[str] = ()) -> list[str]:
    """Names of this machine for clients of HTTP, and `further` ones; in ASCII, as they are sent.

    Raises InputError for one that can't be a name.
    """
    host = socket.gethostname()
    short = host.partition(".")[0]
    # In a home it is mDNS that knows it, under .local.
    names = [host, short, f"{short}.local", *further]
    return list(dict.fromkeys(_ascii(name) for name in names if name))


def _ascii(name: str) -> str:
    try:
        return name.encode("idna").decode().lower()
    except UnicodeError:
        raise InputError(f"--http-name {name}: no host can be called so") from None


class ClusterTls:
    """TLS with a certificate of the cluster's authority, the current one in each handshake.

    It is for this machine's addresses and `names`, and is issued anew at half of its life, when the
    addresses change, and when the cluster's token is rotated.
    """

    def __init__(self, membership: Membership, names: Iterable[str]) -> None:
        """Raises InputError for a name that can't be in a certificate."""
        self._membership = membership
        self._names = [*LOCAL, *names]
        self._keyring = Keyring(
            default_name(), self._issue, lambda: (membership.generations, tuple(own_addresses()))
        )
        self._shown = self._keyring.current
        self._current = _showing(self._shown)
        self.context = _showing(self._shown)
        self.context.sni_callback = self._choose

    def _issue(self, key: Any) -> Identity:
        hosts = [*self._names, *own_addresses()]
        return self._membership.issue_for_hosts(default_name(), hosts, key)

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        """Called in every handshake, also of a client that names no server."""
        if (now := self._keyring.current) is not self._shown:
            self._current, self._shown = _showing(now), now
        connection.context = self._current


def _showing(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    identity.load_into(context)
    return context
