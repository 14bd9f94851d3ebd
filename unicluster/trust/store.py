"""The token that a user's machine keeps, and where it keeps it."""

import errno
import logging
import os
import stat
import sys
import tempfile
from pathlib import Path

from unicluster.errors import TrustError
from unicluster.trust.cluster import ClientAccess, Cluster

log = logging.getLogger(__name__)

# Rotations that are remembered.
MOST_PAST = 100


class Store:
    """Keeps the token of the one cluster that this user's machine is in, or may talk to."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` defaults to $UNICLUSTER_HOME, else to the platform's place for settings."""
        self.folder = folder or default_folder()
        self.path = self.folder / "cluster.token"
        self.client_path = self.folder / "client.token"
        self.old_path = self.folder / "cluster.token.old"  # still trusted, while it is there
        # Fingerprints of the clusters whose token was rotated into the present one.
        self.past_path = self.folder / "rotated"

    def load(self) -> Cluster | None:
        """The stored cluster, or None. Raises TrustError when the file is damaged."""
        token = _read_private(self.path)
        if token is None:
            return None
        try:
            return Cluster.from_token(token)
        except TrustError:
            raise TrustError(
                f"{self.path} is damaged: delete it, then join again: `unicluster join --token -`"
            ) from None

    def load_access(self) -> ClientAccess | None:
        """Access to the stored cluster's chat, or to the one logged in to; None without either.

        Raises TrustError when a file is damaged.
        """
        if (cluster := self.load()) is not None:
            return cluster.client_access
        token = _read_private(self.client_path)
        if token is None:
            return None
        try:
            return ClientAccess.from_token(token)
        except TrustError:
            raise TrustError(
                f"{self.client_path} is damaged: delete it, then `unicluster login` again"
            ) from None

    def access_generations(self) -> list[ClientAccess]:
        """Access by the stored token and, while a rotation is under way, by the one before it.

        Empty without any. Raises TrustError when a file is damaged.
        """
        if self.load() is not None:
            return [cluster.client_access for cluster in self.generations()]
        access = self.load_access()
        return [access] if access is not None else []

    def authorities(self) -> list[str]:
        """PEM of the members' authorities by which servers are known: two in a rotation.

        Raises TrustError where there is no access to any cluster.
        """
        if self.load() is not None:
            return [cluster.ca_pem for cluster in self.generations()]
        return [self.require_access().member_ca_pem]

    def require_access(self) -> ClientAccess:
        """Access to a cluster's chat. Raises TrustError when there is none."""
        access = self.load_access()
        if access is None:
            raise TrustError(
                "this machine is in no cluster: run `unicluster join`, or `unicluster login` "
                "with a client token, which opens chats only"
            )
        return access

    def login(self, token: str) -> ClientAccess:
        """Keep the access that a client token gives, in place of any before.

        Raises TrustError for a bad token, and on a machine that is a member of a cluster.
        """
        access = ClientAccess.from_token(token)
        if (cluster := self.load()) is not None:
            raise TrustError(
                f"this machine is a member of cluster {cluster.fingerprint}, and so has access; "
                f"to leave it, delete {self.path} first"
            )
        self._replace(access.token, self.client_path)
        return access

    def require(self) -> Cluster:
        """The stored cluster. Raises TrustError when there is none."""
        cluster = self.load()
        if cluster is None:
            raise TrustError(
                "this machine is in no cluster: run `unicluster join`, "
                "with `--token -` if the cluster exists"
            )
        return cluster

    def create(self) -> Cluster:
        """Make a new cluster and keep it. Raises TrustError when one is stored already."""
        cluster = Cluster.new()
        temporary = self._write_temporary(cluster.token)
        try:
            # Unlike a rename, a link never replaces what another process has just stored.
            self.path.hardlink_to(temporary)
        except FileExistsError:
            raise TrustError(f"this machine is in a cluster already: see {self.path}") from None
        finally:
            temporary.unlink()
        return cluster

    def load_or_create(self) -> tuple[Cluster, bool]:
        """The stored cluster, else a new one, and whether it is new.

        Agents that start at the same moment end up in the same cluster.
        """
        if (cluster := self.load()) is not None:
            return cluster, False
        try:
            return self.create(), True
        except TrustError:
            return self.require(), False

    def join(self, token: str, *, replace: bool = False) -> Cluster:
        """Keep the cluster of `token`.

        Raises TrustError for a bad token, and when another cluster is stored, unless `replace`.
        """
        cluster = Cluster.from_token(token)
        stored = None if replace else self.load()
        if stored == cluster:
            return cluster
        if stored is not None and cluster.fingerprint in self._past():
            # As in a unit or a container that names a file of it, and starts again.
            log.warning("the token given was rotated since: keeping the new one, in %s", self.path)
            return stored
        if stored is not None:
            raise TrustError(
                f"this machine is in the cluster {stored.fingerprint}, the token is of "
                f"{cluster.fingerprint}: to change over, delete {self.path} first"
            )
        self._replace(cluster.token, self.path)
        self.past_path.unlink(missing_ok=True)
        self.finish_rotation()  # of another cluster
        return cluster

    def generations(self) -> tuple[Cluster, ...]:
        """The stored cluster and, while a rotation is under way, the one before it.

        Raises TrustError when there is none.
        """
        newest = self.require()
        token = _read_private(self.old_path)
        old = Cluster.from_token(token) if token is not None else newest
        return (newest,) if old == newest else (newest, old)

    def rotate(self, new: Cluster | None = None) -> Cluster:
        """Put a `new` secret (a fresh one by default) in place of the stored one, still trusted.

        Raises TrustError when there is none, and while another rotation is under way.
        """
        cluster = new or Cluster.new()
        newest, *older = self.generations()
        if newest == cluster:
            return cluster
        if older:
            raise TrustError(
                "a rotation of the token is under way: end it with "
                "`unicluster token rotate --finish` first"
            )
        # The old one first: there is no moment at which it is not trusted.
        self._replace(newest.token, self.old_path)
        try:
            self._replace(cluster.token, self.path)
        except TrustError:
            self.finish_rotation()  # which has not begun
            raise
        past = [*self._past(), newest.fingerprint][-MOST_PAST:]
        self._replace("\n".join(past), self.past_path)
        return cluster

    def stamp(self) -> tuple[tuple[int, int] | None, ...]:
        """Differs when what is stored does."""
        return tuple(_stamp(path) for path in (self.path, self.old_path, self.client_path))

    def rotation_begun(self) -> float | None:
        """When the rotation that is under way began, in seconds since 1970; None without one."""
        found = _stamp(self.old_path)
        return found[0] / 1e9 if found is not None else None

    def finish_rotation(self) -> None:
        """Trust the old secret no longer."""
        try:
            self.old_path.unlink(missing_ok=True)
        except OSError as error:
            raise TrustError(f"can't delete {self.old_path}: {error.strerror}") from error

    def _past(self) -> list[str]:
        text = _read_private(self.past_path)
        return text.split() if text is not None else []

    def _replace(self, text: str, path: Path) -> None:
        """Put a file with that text in place of another."""
        temporary = self._write_temporary(text)
        try:
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.EBUSY, errno.EXDEV, errno.EROFS):
                raise TrustError(
                    f"{path} is mounted by itself, so it can't be replaced: mount the folder "
                    "instead, and give the token with `join --token-file` (deploy/docker)"
                ) from None
            raise TrustError(f"can't replace {path}: {error.strerror}") from error

    def _write_temporary(self, token: str) -> Path:
        """Write a token beside its final place: renaming that is atomic."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".token-", dir=self.folder)  # mode 0600
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrustError(f"can't write in {self.folder}: {error.strerror}") from error
        return Path(name)


def _read_private(path: Path) -> str | None:
    """Text of a file that only its owner may read; None if there is none."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            log.warning("%s was readable by others (%o): set to 600", path, mode)
            path.chmod(0o600)
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"can't read {path}: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def default_folder() -> Path:
    if home := os.environ.get("UNICLUSTER_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "unicluster"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "unicluster"
