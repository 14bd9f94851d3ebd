"""Services that run on this machine, at which its commands ask first, without waiting for mDNS.

Each leaves a note in unicluster's folder for as long as it listens. Who crashed leaves one behind;
a note is a hint only: at its address nobody answers, or TLS shows that it is somebody else.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__
from unicluster.cluster.channels import join_address
from unicluster.cluster.interfaces import own_addresses
from unicluster.cluster.records import Kind
from unicluster.trust.store import default_folder

log = logging.getLogger(__name__)

FOLDER = "here"
# Where services listen unless somebody chose another port: also those of other users.
DEFAULT_PORTS = {Kind.NODE: 47600, Kind.CHAT: 47700}
# After so many seconds an agent knows the machines that multicast reaches.
SETTLED_SECONDS = 8.0


@dataclass(frozen=True)
class LocalService:
    """A service that may run here. since: when it started, in seconds since 1970; 0: long ago.

    oldest: the oldest protocol that it still works with.
    """

    address: str
    since: float = 0.0
    version: str = __version__
    protocol: int = PROTOCOL
    oldest: int = OLDEST_PROTOCOL

    @property
    def settled(self) -> bool:
        """Whether it has had the time to find the other machines."""
        return not 0 <= time.time() - self.since < SETTLED_SECONDS


@contextlib.contextmanager
def noted(kind: Kind, address: str, port: int) -> Iterator[None]:
    """Keeps a note of a service that listens at `address` ("" for all of them) while it runs."""
    folder = default_folder() / FOLDER
    path = folder / f"{kind.name.lower()}-{port}.json"
    note = {
        "address": join_address(address or own_addresses()[0], port),
        "since": time.time(),
        "version": __version__,
        "protocol": PROTOCOL,
        "oldest": OLDEST_PROTOCOL,
        "pid": os.getpid(),
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _drop_stale(folder)
        path.write_text(json.dumps(note), "utf-8")
    except OSError as error:
        log.info("commands on this machine have to search for it: %s: %s", path, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def services(kind: Kind) -> list[LocalService]:
    """Services of a kind that may be reached here, the longest running first."""
    noted = [_read(path) for path in (default_folder() / FOLDER).glob(f"{kind.name.lower()}-*")]
    known = sorted((s for s in noted if s is not None), key=lambda s: (s.since, s.address))
    usual = join_address(own_addresses()[0], DEFAULT_PORTS[kind])
    if all(service.address != usual for service in known):
        known.append(LocalService(usual))
    return known


def _read(path: Path) -> LocalService | None:
    """None for a file that is no note."""
    try:
        note = json.loads(path.read_text("utf-8"))
        return LocalService(
            address=str(note["address"]),
            since=float(note["since"]),
            version=str(note["version"]),
            protocol=int(note["protocol"]),
            oldest=int(note["oldest"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s: not read: %s", path, error)
        return None


def _drop_stale(folder: Path) -> None:
    """Removes notes of processes that are gone."""
    for path in folder.glob("*.json"):
        try:
            pid = json.loads(path.read_text("utf-8"))["pid"]
            gone = not psutil.pid_exists(pid)
        except (OSError, ValueError, KeyError, TypeError):
            gone = True
        if gone:
            with contextlib.suppress(OSError):  # a folder, or another user's
                path.unlink(missing_ok=True)
