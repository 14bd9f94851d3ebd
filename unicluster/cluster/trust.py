"""Who belongs to a cluster: tokens, the authorities derived from them, and certificates.

Whoever holds the join token is a member: the authorities' keys are derived from its secret, so
each member can issue itself a certificate that all others accept, with nothing online. Of the
three authorities (see roles.py) those for clients and scrapers have secrets of their own, from
which nothing of the cluster's secret follows: who holds one gets in where that role does.
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
from typing import Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from unicluster.cluster.roles import Role
from unicluster.errors import InputError, TrustError

log = logging.getLogger(__name__)

# Certificates are for a role, not for an address: machines change addresses.
SERVER_NAME = "node.unicluster"

YEAR = 365 * 24 * 3600.0
# Of a member's or client's certificate; who runs for longer renews it (see keyring.py).
LIFETIME = 3 * 24 * 3600.0
LIFETIME_VARIABLE = "UNICLUSTER_CERTIFICATE_SECONDS"

_JOIN_PREFIX = "uc1-"
_CLIENT_PREFIX = "ucc1-"
_SECRET_BYTES = 32
_POINT_BYTES = 33  # a compressed point of the curve
# 32 + 3 bytes, and 32 + 33 + 5, fill base32 without padding.
_JOIN_CHECKSUM_BYTES = 3
_CLIENT_CHECKSUM_BYTES = 5
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
    return ec.generate_private_key(_CURVE)


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

    def server_configuration(self, admitted_ca_pem: str) -> grpc.ServerCertificateConfiguration:
        """For a port that admits members, and holders of certificates of another authority."""
        pair = (self.key_pem.encode(), self.cert_pem.encode())
        admitted = (self.ca_pem + admitted_ca_pem).encode()
        return grpc.ssl_server_certificate_configuration([pair], admitted)

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
class Authority:
    """Issues the certificates of one role. The key is derived from `secret`.

    fingerprint: of the cluster.
    """

    role: Role
    secret: bytes = field(repr=False)
    fingerprint: str

    @cached_property
    def ca_pem(self) -> str:
        """The authority's certificate, without a key.

        Members derive the same key, subject and validity, so their copies differ at most in the
        signature, which nobody checks on a trust anchor.
        """
        return _anchor(self.role, self.fingerprint, self._key.public_key(), self._key)

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    def issue(
        self,
        name: str,
        valid_seconds: float,
        trusted_ca_pem: str,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Identity:
        """A certificate for `name`, whose holder trusts `trusted_ca_pem`; a fresh key without one.

        A negative `valid_seconds` gives one that has expired. Raises InputError for a bad name.
        """
        key = key or new_key()
        end = datetime.now(UTC) + timedelta(seconds=valid_seconds)
        # A day's grace: the clocks of a home's machines are seldom equal.
        start = min(datetime.now(UTC), end) - timedelta(days=1)
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        names = []
        if self.role is Role.MEMBER:  # the only ones that have ports
            usage.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names.append(x509.DNSName(SERVER_NAME))
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.public_key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))]))
            .issuer_name(_subject(self.role, self.fingerprint))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(authority, critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Identity(name, key_pem.decode(), cert_pem.decode(), trusted_ca_pem)

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        return _authority_key(self.secret)


@dataclass(frozen=True)
class ClientAccess:
    """Access to a cluster's chat and status, and to nothing else; see Cluster.client_access.

    secret: 32 bytes, from which the clients' authority is derived. member_key: the public key of
    the members' authority, a compressed point of P-256, by which servers are known.
    """

    secret: bytes = field(repr=False)
    member_key: bytes

    @classmethod
    def from_token(cls, token: str) -> "ClientAccess":
        """Read a client token. TrustError says what is wrong with it, never what it holds."""
        body = _unpacked(
            token, _CLIENT_PREFIX, "client", "token client", _SECRET_BYTES + _POINT_BYTES
        )
        access = cls(body[:_SECRET_BYTES], body[_SECRET_BYTES:])
        try:
            access._member_public_key()
        except ValueError:
            raise TrustError("the client token holds no key: ask for another") from None
        return access

    @property
    def token(self) -> str:
        """The text that gives this access to another machine. Secret."""
        return _packed(_CLIENT_PREFIX, self.secret + self.member_key, _CLIENT_CHECKSUM_BYTES)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the cluster."""
        return _fingerprint(self.member_key)

    @cached_property
    def authority(self) -> Authority:
        return Authority(Role.CLIENT, self.secret, self.fingerprint)

    def issue(
        self,
        name: str,
        valid_seconds: float | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Identity:
        """A certificate for a client called `name`, for `lifetime` unless said otherwise."""
        seconds = lifetime() if valid_seconds is None else valid_seconds
        return self.authority.issue(name, seconds, self._member_ca_pem, key)

    @cached_property
    def _member_ca_pem(self) -> str:
        # Signed by nobody in particular: nobody checks the signature of a trust anchor.
        signer = ec.generate_private_key(_CURVE)
        return _anchor(Role.MEMBER, self.fingerprint, self._member_public_key(), signer)

    def _member_public_key(self) -> ec.EllipticCurvePublicKey:
        return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, self.member_key)


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
        if token.strip().lower().startswith(_CLIENT_PREFIX):
            raise TrustError("that is a client token, which joins no cluster: `unicluster login`")
        return cls(_unpacked(token, _JOIN_PREFIX, "join", "token show", _SECRET_BYTES))

    @property
    def token(self) -> str:
        """The text with which a machine joins. Secret."""
        return _packed(_JOIN_PREFIX, self.secret, _JOIN_CHECKSUM_BYTES)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the cluster in public and tell nothing of the secret."""
        return _fingerprint(_point(_authority_key(self._member_secret).public_key()))

    @cached_property
    def members(self) -> Authority:
        """The authority of agents, coordinators and workers."""
        return Authority(Role.MEMBER, self._member_secret, self.fingerprint)

    @cached_property
    def client_access(self) -> ClientAccess:
        """Access for those who may chat and ask for the status, and nothing else."""
        secret = self._derive(b"unicluster/1 clients", _SECRET_BYTES)
        return ClientAccess(secret, _point(self.members.public_key))

    @cached_property
    def scrapers(self) -> Authority:
        """The authority of those who may read metrics, and nothing else."""
        secret = self._derive(b"unicluster/1 scrapers", _SECRET_BYTES)
        return Authority(Role.SCRAPER, secret, self.fingerprint)

    def introduction(self, old: "Cluster") -> str:
        """PEM of this members' authority, signed by that of `old`.

        Behind a member's certificate it lets those in who trust nothing but `old`.
        """
        return _anchor(
            *(Role.MEMBER, self.fingerprint, self.members.public_key, old.members._key),
            issuer=old.fingerprint,
        )

    @property
    def ca_pem(self) -> str:
        """The certificate of the members' authority, by which every server is known."""
        return self.members.ca_pem

    def issue(
        self,
        name: str,
        valid_seconds: float | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Identity:
        """A certificate for the member called `name`, for `lifetime` unless said otherwise."""
        seconds = lifetime() if valid_seconds is None else valid_seconds
        return self.members.issue(name, seconds, self.ca_pem, key)

    @cached_property
    def _member_secret(self) -> bytes:
        return self._derive(b"unicluster/1 members", _SECRET_BYTES)

    def _derive(self, purpose: bytes, length: int) -> bytes:
        return _derived(self.secret, purpose, length)


class Store:
    """Keeps the token of the one cluster that this user's machine is in, or may talk to."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` defaults to $UNICLUSTER_HOME, else to the platform's place for settings."""
        self.folder = folder or default_folder()
        self.path = self.folder / "cluster.token"
        self.client_path = self.folder / "client.token"
        self.old_path = self.folder / "cluster.token.old"  # still trusted, while it is there

    def load(self) -> Cluster | None:
        """The stored cluster, or None. Raises TrustError when the file is damaged."""
        token = _read_private(self.path)
        if token is None:
            return None
        try:
            return Cluster.from_token(token)
        except TrustError:
            raise TrustError(
                f"{self.path} is damaged: delete it, then join again: `unicluster join --token -`"
            ) from None

    def load_access(self) -> ClientAccess | None:
        """Access to the stored cluster's chat, or to the one logged in to; None without either.

        Raises TrustError when a file is damaged.
        """
        if (cluster := self.load()) is not None:
            return cluster.client_access
        token = _read_private(self.client_path)
        if token is None:
            return None
        try:
            return ClientAccess.from_token(token)
        except TrustError:
            raise TrustError(
                f"{self.client_path} is damaged: delete it, then `unicluster login` again"
            ) from None

    def require_access(self) -> ClientAccess:
        """Access to a cluster's chat. Raises TrustError when there is none."""
        access = self.load_access()
        if access is None:
            raise TrustError(
                "this machine is in no cluster: run `unicluster join`, or `unicluster login` "
                "with a client token, which opens chats only"
            )
        return access

    def login(self, token: str) -> ClientAccess:
        """Keep the access that a client token gives, in place of any before.

        Raises TrustError for a bad token, and on a machine that is a member of a cluster.
        """
        access = ClientAccess.from_token(token)
        if (cluster := self.load()) is not None:
            raise TrustError(
                f"this machine is a member of cluster {cluster.fingerprint}, and so has access; "
                f"to leave it, delete {self.path} first"
            )
        self._write_temporary(access.token).replace(self.client_path)
        return access

    def require(self) -> Cluster:
        """The stored cluster. Raises TrustError when there is none."""
        cluster = self.load()
        if cluster is None:
            raise TrustError(
                "this machine is in no cluster: run `unicluster join`, "
                "with `--token -` if the cluster exists"
            )
        return cluster

    def create(self) -> Cluster:
        """Make a new cluster and keep it. Raises TrustError when one is stored already."""
        cluster = Cluster.new()
        temporary = self._write_temporary(cluster.token)
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
        self._write_temporary(cluster.token).replace(self.path)
        self.finish_rotation()  # of another cluster
        return cluster

    def generations(self) -> tuple[Cluster, ...]:
        """The stored cluster and, while a rotation is under way, the one before it.

        Raises TrustError when there is none.
        """
        newest = self.require()
        token = _read_private(self.old_path)
        old = Cluster.from_token(token) if token is not None else newest
        return (newest,) if old == newest else (newest, old)

    def rotate(self, new: Cluster | None = None) -> Cluster:
        """Put a `new` secret (a fresh one by default) in place of the stored one, still trusted.

        Raises TrustError when there is none, and while another rotation is under way.
        """
        cluster = new or Cluster.new()
        newest, *older = self.generations()
        if newest == cluster:
            return cluster
        if older:
            raise TrustError(
                "a rotation of the token is under way: end it with "
                "`unicluster token rotate --finish` first"
            )
        # The old one first: there is no moment at which it is not trusted.
        self._write_temporary(newest.token).replace(self.old_path)
        self._write_temporary(cluster.token).replace(self.path)
        return cluster

    def stamp(self) -> tuple[tuple[int, int] | None, ...]:
        """Differs when what is stored does."""
        return tuple(_stamp(path) for path in (self.path, self.old_path))

    def rotation_begun(self) -> float | None:
        """When the rotation that is under way began, in seconds since 1970; None without one."""
        found = _stamp(self.old_path)
        return found[0] / 1e9 if found is not None else None

    def finish_rotation(self) -> None:
        """Trust the old secret no longer."""
        try:
            self.old_path.unlink(missing_ok=True)
        except OSError as error:
            raise TrustError(f"can't delete {self.old_path}: {error.strerror}") from error

    def _write_temporary(self, token: str) -> Path:
        """Write a token beside its final place: renaming that is atomic."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".token-", dir=self.folder)  # mode 0600
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrustError(f"can't write in {self.folder}: {error.strerror}") from error
        return Path(name)


def _read_private(path: Path) -> str | None:
    """Text of a file that only its owner may read; None if there is none."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            log.warning("%s was readable by others (%o): set to 600", path, mode)
            path.chmod(0o600)
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"can't read {path}: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def default_folder() -> Path:
    if home := os.environ.get("UNICLUSTER_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "unicluster"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "unicluster"


def _derived(secret: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt=None, info=purpose).derive(secret)


def _authority_key(secret: bytes) -> ec.EllipticCurvePrivateKey:
    # 16 bytes more than the order, so that the remainder is uniform (FIPS 186-5, A.2.1).
    number = int.from_bytes(_derived(secret, b"unicluster/1 authority key", 48), "big")
    return ec.derive_private_key(number % (_CURVE_ORDER - 1) + 1, _CURVE)


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def _fingerprint(member_key: bytes) -> str:
    return hashlib.sha256(b"unicluster/1 fingerprint" + member_key).hexdigest()[:16]


def _packed(prefix: str, body: bytes, checksum_bytes: int) -> str:
    text = base64.b32encode(body + _checksum(prefix, body)[:checksum_bytes]).decode().lower()
    return prefix + text


def _unpacked(token: str, prefix: str, kind: str, command: str, length: int) -> bytes:
    """The body of a token, of `length` bytes. Raises TrustError if it is damaged, or none."""
    text = token.strip().lower()
    where = f"copy it from `unicluster {command}` on a machine of the cluster"
    if not text.startswith(prefix):
        raise TrustError(f"that is no {kind} token (they begin with {prefix}): {where}")
    try:
        raw = base64.b32decode(text.removeprefix(prefix).upper())
    except ValueError:  # binascii.Error is one, and what is not ASCII raises another
        raw = b""
    body, checksum = raw[:length], raw[length:]
    if len(body) != length or not checksum or _checksum(prefix, body)[: len(checksum)] != checksum:
        raise TrustError(f"the {kind} token is mistyped or cut off: {where}")
    return body


def _checksum(prefix: str, body: bytes) -> bytes:
    return hashlib.sha256(b"unicluster/1 token" + prefix.encode() + body).digest()


def _subject(role: Role, fingerprint: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role.authority_name(fingerprint))])


def _anchor(
    role: Role,
    fingerprint: str,
    public_key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    issuer: str = "",
) -> str:
    """PEM of an authority's certificate, good as a trust anchor whoever the `signer` is.

    issuer: the fingerprint of the cluster whose members' authority signs; empty: itself.
    """
    # Members' authorities may sign the next generation's. A client's must not: its holders would
    # sign themselves a members' authority.
    lengths = 1 if role is Role.MEMBER and not issuer else 0
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    subject = _subject(role, fingerprint)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_subject(role, issuer) if issuer else subject)
        .public_key(public_key)
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=lengths), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
    if issuer:
        builder = builder.add_extension(signed_by, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


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
