"""A machine's persistent identity: a key that stays where the machine keeps its data.

The id of a machine is a hash of that key, so that nobody can take another's: a name is a label,
and TLS proves which key its bearer has.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from unicluster.errors import InputError, TrustError
from unicluster.trust.identity import CURVE, check_name, new_key
from unicluster.trust.store import default_folder

FOLDER = "machines"


@dataclass
class MachineKey:
    """The key of one machine, which nobody else uses while it is held."""

    key: ec.EllipticCurvePrivateKey
    _lock: int

    def serving_at(self, address: str) -> None:
        """Notes where the machine's agent listens, for whoever wants its name too."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, address.encode(), 0)


@contextlib.contextmanager
def held_machine_key(name: str, folder: Path | None = None) -> Iterator[MachineKey]:
    """The key of the machine called `name`, made at its first use, held while the block runs.

    folder: the default is unicluster's. One home may be shared by several machines, each with a
    name of its own. Raises InputError while another process holds it, TrustError for a damaged key
    or a folder that can't be written.
    """
    check_name(name)
    place = (folder or default_folder()) / FOLDER
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(place / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TrustError(f"can't keep this machine's key in {place}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            where = os.pread(lock, 256, 0).decode(errors="replace")
            at = f" at {where}" if where.isprintable() and where else " on this host"
            raise InputError(
                f"a machine named {name} is already in this cluster{at}: choose another --name"
            ) from None
        os.ftruncate(lock, 0)
        yield MachineKey(_load_or_create(place / f"{name}.key"), lock)
    finally:
        os.close(lock)  # and with it the lock


def _load_or_create(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise TrustError(f"can't read {path}: {error.strerror}") from error
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != CURVE.name:
        raise TrustError(f"{path} is damaged: delete it; the machine then has a new identity")
    return key


def _create(path: Path) -> ec.EllipticCurvePrivateKey:
    key = new_key()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = path.with_suffix(".new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise TrustError(f"can't write {path}: {error.strerror}") from error
    return key
