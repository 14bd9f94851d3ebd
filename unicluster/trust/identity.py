"""Names of machines, and what a machine shows to prove who it is: its key and certificate."""

import hashlib
import os
import re
import socket
import ssl
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from unicluster.errors import InputError

# Certificates are for a role, not for an address: machines change addresses.
SERVER_NAME = "node.unicluster"

YEAR = 365 * 24 * 3600.0
# Of a member's or client's certificate; who runs for longer renews it (see keyring.py).
LIFETIME = 3 * 24 * 3600.0
LIFETIME_VARIABLE = "UNICLUSTER_CERTIFICATE_SECONDS"

CURVE = ec.SECP256R1()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


def check_name(name: str) -> str:
    """`name`, if a machine can be called so: it is part of a certificate and of a DNS label."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} can't name a machine: use up to 48 letters, digits, '-' and '_'"
        )
    return name


def default_name() -> str:
    """This machine's host name, without its domain and with odd characters replaced."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname().split(".")[0]).strip("-_")
    return name[:48] or "machine"


def lifetime() -> float:
    """Seconds that a new certificate is good for. Raises InputError for a bad setting."""
    setting = os.environ.get(LIFETIME_VARIABLE, "")
    try:
        seconds = float(setting or LIFETIME)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= YEAR:
        raise InputError(f"{LIFETIME_VARIABLE}={setting}: give seconds, from 1 to {YEAR:.0f}")
    return seconds


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(CURVE)


def machine_id(key: object) -> str:
    """32 hex digits that name the holder of a public key, which nobody can choose."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return ""  # none of ours
    encoded = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(encoded).hexdigest()[:32]


def server_name_of(machine: str) -> str:
    """The name by which TLS knows one machine's ports; any machine's, without an id."""
    return f"{machine}.{SERVER_NAME}" if machine else SERVER_NAME


class Credentials(Protocol):
    """Who somebody is: an Identity, or a keyring whose identity is renewed."""

    @property
    def name(self) -> str: ...

    @property
    def current(self) -> "Identity": ...


@dataclass(frozen=True)
class Identity:
    """One machine's key and certificate, and the authority it trusts. All PEM."""

    name: str
    key_pem: str = field(repr=False)
    cert_pem: str = field(repr=False)
    ca_pem: str = field(repr=False)

    @property
    def current(self) -> "Identity":
        return self

    @cached_property
    def expires_s(self) -> float:
        """When the certificate does, in seconds since 1970 UTC."""
        return self._certificate.not_valid_after_utc.timestamp()

    def has_key_of(self, cert_pem: bytes) -> bool:
        """Whether a certificate is for the same key, as all are that one keyring renews."""
        other = x509.load_pem_x509_certificate(cert_pem)
        return bool(other.public_key() == self._certificate.public_key())

    @cached_property
    def _certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.cert_pem.encode())

    @cached_property
    def machine(self) -> str:
        """The id that follows from its key."""
        return machine_id(self._certificate.public_key())

    def server_configuration(self, admitted_ca_pem: str) -> grpc.ServerCertificateConfiguration:
        """For a port that admits members, and holders of certificates of another authority."""
        pair = (self.key_pem.encode(), self.cert_pem.encode())
        admitted = (self.ca_pem + admitted_ca_pem).encode()
        return grpc.ssl_server_certificate_configuration([pair], admitted)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca_pem.encode(), self.key_pem.encode(), self.cert_pem.encode()
        )

    def load_into(self, context: ssl.SSLContext) -> None:
        """Has a server's side of TLS show this certificate."""
        # Python reads a key only from a file: this one is its owner's, and gone at once.
        with tempfile.TemporaryDirectory() as folder:
            pair = Path(folder, "pair.pem")
            pair.write_text(self.key_pem + self.cert_pem)
            context.load_cert_chain(pair)

    def to_dict(self) -> dict[str, str]:
        """For a child process. Holds the key: pass it through a pipe, not a command line."""
        return {
            "name": self.name,
            "key_pem": self.key_pem,
            "cert_pem": self.cert_pem,
            "ca_pem": self.ca_pem,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, str]) -> "Identity":
        return cls(fields["name"], fields["key_pem"], fields["cert_pem"], fields["ca_pem"])
