"""Certificates that renew themselves while a process runs.

A process that lasts holds a Keyring in place of an Identity. Ports show its current certificate in
every handshake; a channel shows the one that was current when it was made, which is good for at
least half of a lifetime more, so that whoever keeps one for longer makes it anew.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from unicluster.errors import TrustError
from unicluster.trust.cluster import ClientAccess, Cluster
from unicluster.trust.identity import Identity, lifetime, new_key
from unicluster.trust.role import audit
from unicluster.trust.store import Store

log = logging.getLogger(__name__)

# Between two looks whether a certificate is to be renewed, at most.
LOOK_SECONDS = 2.0


class Membership:
    """The generations of a cluster's secret that are trusted now, the newest first.

    Follows the store, so that a rotation reaches what runs. Threads may share it.
    """

    def __init__(self, cluster: Cluster, store: Store | None = None) -> None:
        """Without a `store` it stays as it is."""
        self._generations: tuple[Cluster, ...] = (cluster,)
        self._store = store
        self._lock = threading.Lock()
        self._looked = -LOOK_SECONDS
        self._seen: object = None

    @property
    def generations(self) -> tuple[Cluster, ...]:
        with self._lock:
            if self._store is not None and time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look(self._store)
                self._looked = time.monotonic()
            return self._generations

    @property
    def fingerprints(self) -> list[str]:
        return [cluster.fingerprint for cluster in self.generations]

    def issue(self, name: str, key: ec.EllipticCurvePrivateKey) -> Identity:
        """A certificate of the newest generation, which the members of all accept."""
        newest, *older = self.generations
        return _introduced(newest.issue(name, key=key), newest, older)

    def issue_for_hosts(
        self, name: str, hosts: Iterable[str], key: ec.EllipticCurvePrivateKey
    ) -> Identity:
        """A certificate for HTTPS, which whoever trusts any of the generations accepts.

        hosts: as of Authority.issue_for_hosts, which it raises as.
        """
        newest, *older = self.generations
        identity = newest.members.issue_for_hosts(name, hosts, lifetime(), key)
        return _introduced(identity, newest, older)

    def clients_ca_pem(self) -> str:
        """Authorities of those who may chat."""
        return "".join(each.client_access.authority.ca_pem for each in self.generations)

    def scrapers_ca_pem(self) -> str:
        """Authorities of those who may read metrics."""
        return "".join(each.scrapers.ca_pem for each in self.generations)

    def _look(self, store: Store) -> None:
        seen = store.stamp()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            generations = store.generations()
        except TrustError as error:
            log.warning("%s; going on with the token known so far", error)
            return
        if generations != self._generations:
            names = " and ".join(each.fingerprint for each in generations)
            audit.info("members of cluster %s are trusted now", names)
            self._generations = generations


def _introduced(identity: Identity, newest: Cluster, older: Iterable[Cluster]) -> Identity:
    """An identity of the `newest` generation that those of the older ones accept, and it them."""
    trusted = "".join(cluster.ca_pem for cluster in (newest, *older))
    chain = "".join(newest.introduction(old) for old in older)
    return replace(identity, ca_pem=trusted, cert_pem=identity.cert_pem + chain)


class Keyring:
    """One holder's identity, issued anew at half of its life for the same key.

    Threads may share it.
    """

    def __init__(
        self,
        name: str,
        issue: Callable[[ec.EllipticCurvePrivateKey], Identity],
        basis: Callable[[], object] = tuple,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        """`issue` makes a certificate for a key; it is called now, and at each renewal.

        It is also called when `basis()` is no longer what it was: what certificates follow from.
        key: a machine's persistent one; without it, one that lasts as long as the keyring.
        """
        self.name = name
        self._key = key or new_key()
        self._issue = issue
        self._basis = basis
        self._lock = threading.Lock()
        self._renew()

    @classmethod
    def of_member(
        cls, membership: "Membership", name: str, key: ec.EllipticCurvePrivateKey | None = None
    ) -> "Keyring":
        """For an agent, a coordinator or a worker. Raises InputError for a bad name."""
        return cls(
            name, lambda key: membership.issue(name, key), lambda: membership.generations, key
        )

    @classmethod
    def of_client(cls, access: ClientAccess, name: str) -> "Keyring":
        """For who chats and no more. Raises InputError for a bad name."""
        return cls(name, lambda key: access.issue(name, key=key))

    @classmethod
    def of_access(cls, store: Store, name: str) -> "Keyring":
        """For who chats, with the access that is stored now; while there is none, the last.

        Raises TrustError where there is none to begin with, and InputError for a bad name.
        """
        store.require_access()
        generations: list[ClientAccess] = []

        def issue(key: ec.EllipticCurvePrivateKey) -> Identity:
            try:
                generations[:] = store.access_generations() or generations
            except TrustError as error:
                if not generations:
                    raise
                log.warning("%s; going on with the access known so far", error)
            # The oldest certificate, which is good everywhere until the rotation is finished: not
            # all servers know of one at the same moment.
            identity = generations[-1].issue(name, key=key)
            return replace(identity, ca_pem="".join(each.member_ca_pem for each in generations))

        return cls(name, issue, store.stamp)

    @property
    def current(self) -> Identity:
        """The identity to show now. Renews it first, if half of its life has passed."""
        with self._lock:
            if self._basis() != self._based_on or not self._issued <= time.time() < self._half_life:
                self._renew()
            return self._identity

    async def renewals(self) -> AsyncIterator[Identity]:
        """Each identity after the current one, soon after it was issued; without end."""
        last = self.current
        while True:
            left = self._half_life - time.time()
            await asyncio.sleep(min(LOOK_SECONDS, max(left, 0.1)))
            if (now := self.current) is not last:
                last = now
                yield now

    def _renew(self) -> None:
        self._based_on = self._basis()
        self._identity = self._issue(self._key)
        self._issued = time.time()
        self._half_life = (self._issued + self._identity.expires_s) / 2


class HandedKeyring:
    """An identity that another process issues and renews: a worker's, by its agent."""

    def __init__(self, identity: Identity) -> None:
        self.current = identity

    @property
    def name(self) -> str:
        return self.current.name
