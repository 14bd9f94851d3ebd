"""The claim of one process of this machine to run a service, which ends with the process."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

from unicluster.errors import InputError, printable
from unicluster.trust.store import default_folder

FOLDER = "services"
# One that is ending unloads its stages first.
WAIT_SECONDS = 8.0
LOOK_SECONDS = 0.1


class Claim:
    """A service that is this process's to run."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def at(self, where: str) -> None:
        """Notes where it is served, for others who would."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, where.encode(), 0)


@contextlib.asynccontextmanager
async def claimed(service: str, where: str, folder: Path | None = None) -> AsyncIterator[Claim]:
    """While the block runs, no other process of this machine's user can claim the service.

    where: who claims it, for the others. A claim ends with its process, however
    that ends. Raises InputError where another one has it, and does not end within WAIT_SECONDS.
    """
    place = (folder or default_folder()) / FOLDER
    name = sha256(service.encode()).hexdigest()[:16]
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(place / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"the folder {place} can't be used: {error}") from None
    try:
        await _take(lock, service)
        claim = Claim(lock)
        claim.at(where)
        yield claim
    finally:
        os.close(lock)  # and with it the claim


async def _take(lock: int, service: str) -> None:
    clock = asyncio.get_running_loop().time
    until = clock() + WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if clock() > until:
                holder = printable(os.pread(lock, 256, 0).decode(errors="replace"))
                raise already_served(service, holder) from None
        await asyncio.sleep(LOOK_SECONDS)


def already_served(service: str, where: str) -> InputError:
    """The error of a coordinator that was started beside another one by mistake."""
    at = f", from {where}" if where else ""
    return InputError(
        f"{service} is served already{at}: end that first, or serve it once more with "
        "--service NAME"
    )
