"""Who belongs to a cluster: the join token, the authority derived from it, and certificates.

Whoever holds the token is a member. The authority's key is derived from the token's secret, so
each member can issue itself a certificate that all others accept, with nothing online.
"""

import base64
import hashlib
import logging
import os
import re
import secrets
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from unicluster.errors import InputError, TrustError

log = logging.getLogger(__name__)

# Certificates are for a role, not for an address: machines change addresses.
SERVER_NAME = "node.unicluster"

YEAR = 365 * 24 * 3600.0

_PREFIX = "uc1-"
_SECRET_BYTES = 32
_CHECKSUM_BYTES = 3  # 32 + 3 bytes fill 56 characters of base32 without padding
_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
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


@dataclass(frozen=True)
class Identity:
    """One machine's key and certificate, and the authority it trusts. All PEM."""

    name: str
    key_pem: str = field(repr=False)
    cert_pem: str = field(repr=False)
    ca_pem: str = field(repr=False)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port that admits only clients with a certificate of this cluster."""
        pair = (self.key_pem.encode(), self.cert_pem.encode())
        return grpc.ssl_server_credentials([pair], self.ca_pem.encode(), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca_pem.encode(), self.key_pem.encode(), self.cert_pem.encode()
        )

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


@dataclass(frozen=True)
class Cluster:
    """A cluster, as known to a member: its 32-byte secret and all that follows from it."""

    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> "Cluster":
        return cls(secrets.token_bytes(_SECRET_BYTES))

    @classmethod
    def from_token(cls, token: str) -> "Cluster":
        """Read a join token. TrustError says what is wrong with it, never what it holds."""
        body = token.strip().lower()
        if not body.startswith(_PREFIX):
            raise TrustError(
                f"that is no join token (they begin with {_PREFIX}): "
                "copy it from `unicluster token show` on a machine of the cluster"
            )
        try:
            raw = base64.b32decode(body.removeprefix(_PREFIX).upper())
        except ValueError:  # binascii.Error is one, and what is not ASCII raises another
            raw = b""
        secret, checksum = raw[:_SECRET_BYTES], raw[_SECRET_BYTES:]
        if len(secret) != _SECRET_BYTES or checksum != _checksum(secret):
            raise TrustError(
                "the join token is mistyped or cut off: "
                "copy it again from `unicluster token show` on a machine of the cluster"
            )
        return cls(secret)

    @property
    def token(self) -> str:
        """What a machine needs in order to join. Secret."""
        text = base64.b32encode(self.secret + _checksum(self.secret)).decode().lower()
        return _PREFIX + text

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the cluster in public and tell nothing of the secret."""
        return self._derive(b"unicluster/1 fingerprint", 8).hex()

    @cached_property
    def broker_password(self) -> str:
        """What `unicluster broker` asks for: members know it, others can be told. Secret."""
        return self._derive(b"unicluster/1 broker password", 20).hex()

    @cached_property
    def ca_pem(self) -> str:
        """The authority's certificate.

        Members derive the same key, subject and validity, so their copies differ at most in the
        signature, which nobody checks on a trust anchor.
        """
        public_key = self._ca_key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._ca_subject)
            .issuer_name(self._ca_subject)
            .public_key(public_key)
            .serial_number(1)
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .sign(self._ca_key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, name: str, valid_seconds: float = YEAR) -> Identity:
        """A fresh key and certificate for the machine called `name`.

        A negative `valid_seconds` gives one that has expired. Raises InputError for a bad name.
        """
        key = ec.generate_private_key(_CURVE)
        end = datetime.now(UTC) + timedelta(seconds=valid_seconds)
        # A day's grace: the clocks of a home's machines are seldom equal.
        start = min(datetime.now(UTC), end) - timedelta(days=1)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca_key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))]))
            .issuer_name(self._ca_subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._ca_key, hashes.SHA256())
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Identity(name, key_pem.decode(), cert_pem.decode(), self.ca_pem)

    @cached_property
    def scrapers(self) -> "Cluster":
        """An authority for those who may read metrics, and nothing else.

        No member trusts its certificates but at the metrics port, and none of them tells anything
        of the cluster's secret.
        """
        return Cluster(self._derive(b"unicluster/1 scrapers", _SECRET_BYTES))

    @cached_property
    def _ca_key(self) -> ec.EllipticCurvePrivateKey:
        # 16 bytes more than the order, so that the remainder is uniform (FIPS 186-5, A.2.1).
        number = int.from_bytes(self._derive(b"unicluster/1 authority key", 48), "big")
        return ec.derive_private_key(number % (_CURVE_ORDER - 1) + 1, _CURVE)

    @property
    def _ca_subject(self) -> x509.Name:
        common_name = f"unicluster {self.fingerprint}"
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])

    def _derive(self, purpose: bytes, length: int) -> bytes:
        return HKDF(hashes.SHA256(), length, salt=None, info=purpose).derive(self.secret)


class Store:
    """Keeps the token of the one cluster that this user's machine is in."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` defaults to $UNICLUSTER_HOME, else to the platform's place for settings."""
        self.folder = folder or default_folder()
        self.path = self.folder / "cluster.token"

    def load(self) -> Cluster | None:
        """The stored cluster, or None. Raises TrustError when the file is damaged."""
        try:
            mode = stat.S_IMODE(self.path.stat().st_mode)
            if mode & 0o077:
                log.warning("%s was readable by others (%o): set to 600", self.path, mode)
                self.path.chmod(0o600)
            token = self.path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrustError(f"can't read {self.path}: {error.strerror}") from error
        try:
            return Cluster.from_token(token)
        except TrustError:
            raise TrustError(
                f"{self.path} is damaged: delete it, then join again with `unicluster join --token`"
            ) from None

    def require(self) -> Cluster:
        """The stored cluster. Raises TrustError when there is none."""
        cluster = self.load()
        if cluster is None:
            raise TrustError(
                "this machine is in no cluster: run `unicluster join`, "
                "with --token if the cluster exists"
            )
        return cluster

    def create(self) -> Cluster:
        """Make a new cluster and keep it. Raises TrustError when one is stored already."""
        cluster = Cluster.new()
        temporary = self._write_temporary(cluster)
        try:
            # Unlike a rename, a link never replaces what another process has just stored.
            self.path.hardlink_to(temporary)
        except FileExistsError:
            raise TrustError(f"this machine is in a cluster already: see {self.path}") from None
        finally:
            temporary.unlink()
        return cluster

    def load_or_create(self) -> tuple[Cluster, bool]:
        """The stored cluster, else a new one, and whether it is new.

        Agents that start at the same moment end up in the same cluster.
        """
        if (cluster := self.load()) is not None:
            return cluster, False
        try:
            return self.create(), True
        except TrustError:
            return self.require(), False

    def join(self, token: str, *, replace: bool = False) -> Cluster:
        """Keep the cluster of `token`.

        Raises TrustError for a bad token, and when another cluster is stored, unless `replace`.
        """
        cluster = Cluster.from_token(token)
        stored = None if replace else self.load()
        if stored == cluster:
            return cluster
        if stored is not None:
            raise TrustError(
                f"this machine is in the cluster {stored.fingerprint}, the token is of "
                f"{cluster.fingerprint}: to change over, delete {self.path} first"
            )
        self._write_temporary(cluster).replace(self.path)
        return cluster

    def rotate(self) -> Cluster:
        """Replace the stored cluster by a new one: no member of the old one is trusted by it.

        Raises TrustError when there is none.
        """
        self.require()
        cluster = Cluster.new()
        self._write_temporary(cluster).replace(self.path)
        return cluster

    def _write_temporary(self, cluster: Cluster) -> Path:
        """Write the token beside its final place: renaming that is atomic."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".token-", dir=self.folder)  # mode 0600
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(cluster.token + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrustError(f"can't write in {self.folder}: {error.strerror}") from error
        return Path(name)


def default_folder() -> Path:
    if home := os.environ.get("UNICLUSTER_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "unicluster"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "unicluster"


def _checksum(secret: bytes) -> bytes:
    return hashlib.sha256(b"unicluster/1 token" + secret).digest()[:_CHECKSUM_BYTES]


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
