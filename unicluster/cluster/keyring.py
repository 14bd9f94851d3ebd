"""Certificates that renew themselves while a process runs.

A process that lasts holds a Keyring in place of an Identity. Ports show its current certificate in
every handshake; a channel shows the one that was current when it was made, which is good for at
least half of a lifetime more, so that whoever keeps one for longer makes it anew.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

from cryptography.hazmat.primitives.asymmetric import ec

from unicluster.cluster.trust import ClientAccess, Cluster, Identity, new_key

# Between two looks whether a certificate is to be renewed, at most.
LOOK_SECONDS = 5.0


class Keyring:
    """One holder's identity, issued anew at half of its life for the same key.

    Threads may share it.
    """

    def __init__(self, name: str, issue: Callable[[ec.EllipticCurvePrivateKey], Identity]) -> None:
        """`issue` makes a certificate for a key; it is called now, and at each renewal."""
        self.name = name
        self._key = new_key()
        self._issue = issue
        self._lock = threading.Lock()
        self._renew()

    @classmethod
    def of_member(cls, cluster: Cluster, name: str) -> "Keyring":
        """For an agent, a coordinator or a worker. Raises InputError for a bad name."""
        return cls(name, lambda key: cluster.issue(name, key=key))

    @classmethod
    def of_client(cls, access: ClientAccess, name: str) -> "Keyring":
        """For who chats and no more. Raises InputError for a bad name."""
        return cls(name, lambda key: access.issue(name, key=key))

    @property
    def current(self) -> Identity:
        """The identity to show now. Renews it first, if half of its life has passed."""
        with self._lock:
            if not self._issued <= time.time() < self._half_life:
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
