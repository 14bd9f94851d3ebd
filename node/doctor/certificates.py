"""Checks of `unicluster doctor` on certificates: how long those that ports show are good for."""

import asyncio
import ssl
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509

from node.doctor.finding import Finding, Level
from unicluster.cluster.channels import split_address
from unicluster.trust.identity import Identity, lifetime
from unicluster.trust.keyring import Membership

HANDSHAKE_SECONDS = 5.0
DAY = 86400.0


def authorities(membership: Membership) -> list[Finding]:
    """How long the members' authorities are good for: one, and two in a rotation."""
    findings = []
    for index, cluster in enumerate(membership.generations):
        which = "the old token's, until `token rotate --finish`" if index else "the token's"
        days = cluster.authority_seconds_left / DAY
        message = f"{which} authority, of cluster {cluster.fingerprint}: {days:,.0f} days left"
        findings.append(Finding(Level.OK, "authority", message))
    return findings


async def shown(ports: Mapping[str, str], identity: Identity) -> list[Finding]:
    """How long the certificate is good for that each port shows; `ports`: names by address."""
    context = client_side(identity)
    expiring = await asyncio.gather(*(_expiry(address, context) for address in ports))
    pairs = zip(ports.values(), expiring, strict=True)
    return [judged(who, expiry - time.time()) for who, expiry in pairs if expiry is not None]


def judged(who: str, left: float) -> Finding:
    """Finding about a certificate that expires in `left` seconds; it renews itself at half."""
    message = f"{who} shows a certificate that is good for {left / DAY:.1f} days"
    if left > lifetime() / 4:
        return Finding(Level.OK, "certificate", message)
    remedy = f"it should renew itself: look at its log, and at the clocks; start {who} again"
    return Finding(Level.ERROR if left < 0 else Level.WARNING, "certificate", message, remedy)


async def _expiry(address: str, context: ssl.SSLContext) -> float | None:
    """Seconds since 1970 UTC at which a port's certificate expires; None where none is shown."""
    host, port = split_address(address)
    try:
        _, writer = await asyncio.wait_for(
            asyncio.open_connection(host, port, ssl=context, server_hostname=""), HANDSHAKE_SECONDS
        )
    except (OSError, TimeoutError):
        return None  # another finding says so
    try:
        shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
    return x509.load_der_x509_certificate(shown).not_valid_after_utc.timestamp()


def client_side(identity: Identity) -> ssl.SSLContext:
    """TLS towards a port of the cluster, whose host name does not count."""
    context = ssl.create_default_context(cadata=identity.ca_pem)
    context.check_hostname = False  # the cluster's authority is all that counts, as everywhere
    context.set_alpn_protocols(["h2"])
    # Python reads a key only from a file: this one is its owner's, and gone at once.
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder, "pair.pem")
        pair.write_text(identity.key_pem + identity.cert_pem)
        context.load_cert_chain(pair)
    return context
