"""Who belongs to a cluster: tokens, the authorities derived from them, and certificates.

Whoever holds the join token is a member: the authorities' keys are derived from its secret, so
each member can issue itself a certificate that all others accept, with nothing online. Of the
three authorities (see roles.py) those for clients and scrapers have secrets of their own, from
which nothing of the cluster's secret follows: who holds one gets in where that role does.
"""

import base64
import hashlib
import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from unicluster.errors import TrustError
from unicluster.trust.authority import (
    Authority,
    authority_key,
    compressed_point,
    derived,
    fingerprint_of,
    trust_anchor,
)
from unicluster.trust.identity import CURVE, Identity, lifetime
from unicluster.trust.role import Role

_JOIN_PREFIX = "uc1-"
_CLIENT_PREFIX = "ucc1-"
_SECRET_BYTES = 32
_POINT_BYTES = 33  # a compressed point of the curve
# 32 + 3 bytes, and 32 + 33 + 5, fill base32 without padding.
_JOIN_CHECKSUM_BYTES = 3
_CLIENT_CHECKSUM_BYTES = 5


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
        return fingerprint_of(self.member_key)

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
        return self.authority.issue(name, seconds, self.member_ca_pem, key)

    @cached_property
    def member_ca_pem(self) -> str:
        """The certificate of the members' authority, by which every server is known."""
        # Signed by nobody in particular: nobody checks the signature of a trust anchor.
        signer = ec.generate_private_key(CURVE)
        return trust_anchor(Role.MEMBER, self.fingerprint, self._member_public_key(), signer)

    def _member_public_key(self) -> ec.EllipticCurvePublicKey:
        return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, self.member_key)


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
        return fingerprint_of(compressed_point(authority_key(self._member_secret).public_key()))

    @cached_property
    def members(self) -> Authority:
        """The authority of agents, coordinators and workers."""
        return Authority(Role.MEMBER, self._member_secret, self.fingerprint)

    @cached_property
    def client_access(self) -> ClientAccess:
        """Access for those who may chat and ask for the status, and nothing else."""
        secret = self._derive(b"unicluster/1 clients", _SECRET_BYTES)
        return ClientAccess(secret, compressed_point(self.members.public_key))

    @cached_property
    def scrapers(self) -> Authority:
        """The authority of those who may read metrics, and nothing else."""
        secret = self._derive(b"unicluster/1 scrapers", _SECRET_BYTES)
        return Authority(Role.SCRAPER, secret, self.fingerprint)

    def introduction(self, old: "Cluster") -> str:
        """PEM of this members' authority, signed by that of `old`.

        Behind a member's certificate it lets those in who trust nothing but `old`.
        """
        return trust_anchor(
            *(Role.MEMBER, self.fingerprint, self.members.public_key, old.members._key),
            issuer=old.fingerprint,
        )

    @property
    def ca_pem(self) -> str:
        """The certificate of the members' authority, by which every server is known."""
        return self.members.ca_pem

    @property
    def authority_seconds_left(self) -> float:
        """Seconds until the certificate of the members' authority expires."""
        certificate = x509.load_pem_x509_certificate(self.ca_pem.encode())
        return certificate.not_valid_after_utc.timestamp() - time.time()

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
        return derived(self.secret, purpose, length)


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
