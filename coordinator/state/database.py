"""The state file: a small SQLite database beside the cluster's token, its schema versioned."""

import contextlib
import errno
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from unicluster import failpoints
from unicluster.errors import InputError, UnavailableError
from unicluster.trust.store import default_folder

NAME = "state.sqlite3"
# For another process that writes.
BUSY_SECONDS = 5.0
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO}

# Version n of the schema is what the first n of these make. Only ever append.
MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        hash BLOB NOT NULL UNIQUE,
        created_s REAL NOT NULL,
        expires_s REAL,
        revoked_s REAL,
        most_running INTEGER,
        tokens_per_minute INTEGER,
        models TEXT
    ) STRICT;
    CREATE UNIQUE INDEX key_names ON keys (name) WHERE revoked_s IS NULL;
    """,
    """
    CREATE TABLE services (
        name TEXT PRIMARY KEY,
        options TEXT NOT NULL,
        since_s REAL NOT NULL,
        inspected TEXT,
        cut TEXT
    ) STRICT;
    """,
    """
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at_s REAL NOT NULL,
        service TEXT NOT NULL,
        kind TEXT NOT NULL,
        machine TEXT NOT NULL,
        cause TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE layouts (
        service TEXT PRIMARY KEY,
        options TEXT NOT NULL,
        cut TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE drains (
        machine TEXT PRIMARY KEY,
        since_s REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE drained (
        machine TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        since_s REAL NOT NULL
    ) STRICT;
    INSERT INTO drained (machine, name, since_s)
        SELECT 'name ' || machine, machine, since_s FROM drains;
    DROP TABLE drains;
    """,
)


class Database:
    """A connection to the state file at `path`, which is made where it is missing.

    For one thread. Errors name the file: InputError for one that can't be used, because it is
    damaged or a newer version has written it; UnavailableError for what may pass by itself: a full
    disk, or another process that writes for longer than BUSY_SECONDS.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_folder() / NAME
        with self._explained():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            self.path.chmod(0o600)
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None
            )
            try:
                self._connection.row_factory = sqlite3.Row
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._migrate()
            except BaseException:
                self._connection.close()
                raise

    def rows(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """The rows that a query gives."""
        with self._explained():
            return list(self._connection.execute(query, values))

    def write(self, statement: str, values: Sequence[object] = ()) -> int:
        """Changes rows, on disk when it returns; how many. Raises sqlite3.IntegrityError."""
        failpoints.reach("state.write")
        with self._explained():
            changed = self._connection.execute(statement, values).rowcount
        failpoints.reach("state.written")
        return changed

    def close(self) -> None:
        self._connection.close()

    def _migrate(self) -> None:
        execute = self._connection.execute
        if self._version() == len(MIGRATIONS):
            return  # and nothing is written: on a full disk it can still be read
        execute("BEGIN IMMEDIATE")
        try:
            for migration in MIGRATIONS[self._version() :]:
                for statement in migration.split(";"):
                    execute(statement)
            execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite may have ended it, on a full disk
                execute("ROLLBACK")
            raise

    def _version(self) -> int:
        """Version of the schema. Raises InputError for one that is not known here."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise InputError(
                f"{self.path} was written by a newer unicluster: update this one, or delete "
                "the file, and the keys with it"
            )
        return int(version)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except (sqlite3.Error, OSError) as error:
            kind = UnavailableError if _may_pass(error) else InputError
            raise kind(f"the state file {self.path} can't be used: {error}") from error


def _may_pass(error: sqlite3.Error | OSError) -> bool:
    """Whether the same may work later: where a disk is full, slow or failing, or a lock is held."""
    if isinstance(error, OSError):
        return error.errno in _PASSING
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the kind of I/O
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY)
