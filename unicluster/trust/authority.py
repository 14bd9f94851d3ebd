"""Certificate authorities: one a role, each derived from a secret of its own."""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from unicluster.errors import InputError
from unicluster.trust.identity import (
    CURVE,
    SERVER_NAME,
    Identity,
    check_name,
    machine_id,
    new_key,
    server_name_of,
)
from unicluster.trust.role import Role

_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


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
        return trust_anchor(self.role, self.fingerprint, self._key.public_key(), self._key)

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
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        names: list[x509.GeneralName] = []
        if self.role is Role.MEMBER:  # the only ones that have ports
            usage.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names.append(x509.DNSName(SERVER_NAME))
            names.append(x509.DNSName(server_name_of(machine_id(key.public_key()))))
        return self._issue(name, valid_seconds, trusted_ca_pem, key, usage, names)

    def issue_for_hosts(
        self, name: str, hosts: Iterable[str], valid_seconds: float, key: ec.EllipticCurvePrivateKey
    ) -> Identity:
        """A certificate for a server of HTTPS on machine `name`, whom clients know by `hosts`.

        hosts: host names in ASCII, and addresses. It opens no port of the cluster, and no member
        takes its holder for one. Raises InputError for a bad name.
        """
        names = [_general_name(host) for host in dict.fromkeys(hosts)]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH]
        return self._issue(name, valid_seconds, self.ca_pem, key, usage, names)

    def _issue(
        self,
        name: str,
        valid_seconds: float,
        trusted_ca_pem: str,
        key: ec.EllipticCurvePrivateKey,
        usage: list[x509.ObjectIdentifier],
        names: list[x509.GeneralName],
    ) -> Identity:
        end = datetime.now(UTC) + timedelta(seconds=valid_seconds)
        # A day's grace: the clocks of a home's machines are seldom equal.
        start = min(datetime.now(UTC), end) - timedelta(days=1)
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
        return authority_key(self.secret)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InputError(f"{host!r} can't be in a certificate: give a host name in ASCII") from None


def derived(secret: bytes, purpose: bytes, length: int) -> bytes:
    """`length` bytes for `purpose`, from which nothing of `secret` follows (HKDF, SHA-256)."""
    return HKDF(hashes.SHA256(), length, salt=None, info=purpose).derive(secret)


def authority_key(secret: bytes) -> ec.EllipticCurvePrivateKey:
    """The key of the authority that has this secret."""
    # 16 bytes more than the order, so that the remainder is uniform (FIPS 186-5, A.2.1).
    number = int.from_bytes(derived(secret, b"unicluster/1 authority key", 48), "big")
    return ec.derive_private_key(number % (_CURVE_ORDER - 1) + 1, CURVE)


def compressed_point(key: ec.EllipticCurvePublicKey) -> bytes:
    """33 bytes of a public key."""
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def fingerprint_of(member_key: bytes) -> str:
    """16 hex digits that name the cluster whose members' authority has that public key."""
    return hashlib.sha256(b"unicluster/1 fingerprint" + member_key).hexdigest()[:16]


def _subject(role: Role, fingerprint: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role.authority_name(fingerprint))])


def trust_anchor(
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
