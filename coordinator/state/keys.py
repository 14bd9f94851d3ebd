"""Keys of the HTTP doors: made once and shown once, kept as hashes, with limits."""

import hashlib
import json
import secrets
import sqlite3
import time
from dataclasses import dataclass

from coordinator.state.database import Database
from unicluster.errors import InputError, NotFoundError, shown

PREFIX = "sk-uc-"
SECRET_BYTES = 32
NAME_CHARACTERS = 64


@dataclass(frozen=True)
class Limits:
    """Limits of a key; None: as much as the door allows. Seconds are since 1970 UTC."""

    most_running: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None
    expires_s: float | None = None


@dataclass(frozen=True)
class Key:
    """A key without its secret. `id` is public and names it in logs."""

    id: str
    name: str
    created_s: float
    revoked_s: float | None
    limits: Limits

    def state(self, now_s: float) -> str:
        """good, expired or revoked."""
        if self.revoked_s is not None:
            return "revoked"
        expires_s = self.limits.expires_s
        return "expired" if expires_s is not None and expires_s <= now_s else "good"


class Keys:
    """The keys of a state file. Other processes may change them at any time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, limits: Limits) -> tuple[Key, str]:
        """A new key and its secret, which is not kept. Raises InputError for a name in use."""
        if not name.strip() or len(name) > NAME_CHARACTERS or not name.isprintable():
            raise InputError(
                f"{shown(name)} can't name a key: 1 to {NAME_CHARACTERS} printable characters"
            )
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        key = Key(secrets.token_hex(4), name, time.time(), None, limits)
        models = None if limits.models is None else json.dumps(limits.models)
        try:
            self._database.write(
                "INSERT INTO keys (id, name, hash, created_s, expires_s, most_running, "
                "tokens_per_minute, models) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key.id, name, _hash(secret), key.created_s, limits.expires_s),
                    *(limits.most_running, limits.tokens_per_minute, models),
                ),
            )
        except sqlite3.IntegrityError:
            raise InputError(f"a key {shown(name)} exists: revoke it first") from None
        return key, secret

    def all(self) -> list[Key]:
        """All keys, revoked ones included, the oldest first."""
        return [_key(row) for row in self._database.rows("SELECT * FROM keys ORDER BY created_s")]

    def any(self) -> bool:
        """Whether there is a key that was not revoked: then nobody gets in without one."""
        return bool(self._database.rows("SELECT 1 FROM keys WHERE revoked_s IS NULL LIMIT 1"))

    def find(self, secret: str) -> Key | None:
        """The key with that secret, revoked and expired ones included."""
        rows = self._database.rows("SELECT * FROM keys WHERE hash = ?", (_hash(secret),))
        return _key(rows[0]) if rows else None

    def revoke(self, name: str) -> Key:
        """Ends the key of that name or id. Raises NotFoundError where there is none."""
        for key in self.all():
            if key.revoked_s is None and name in (key.name, key.id):
                self._database.write(
                    "UPDATE keys SET revoked_s = ? WHERE id = ?", (time.time(), key.id)
                )
                return key
        raise NotFoundError(f"there is no key {shown(name)}: see `unicluster key list`")


def _hash(secret: str) -> bytes:
    # A secret of 256 random bits can't be guessed: a slow hash would protect nothing.
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _key(row: sqlite3.Row) -> Key:
    models = None if row["models"] is None else tuple(json.loads(row["models"]))
    limits = Limits(row["most_running"], row["tokens_per_minute"], models, row["expires_s"])
    return Key(row["id"], row["name"], row["created_s"], row["revoked_s"], limits)
