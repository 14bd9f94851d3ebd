"""Disks and directories that one process sees in its own way: for root of a Linux machine."""

import shlex
import shutil
import subprocess
from pathlib import Path

OWN_MOUNTS = ("unshare", "--mount")


def can_mount() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*OWN_MOUNTS, "true"]).returncode == 0


def behind_a_disk(path: Path, size: str = "1m") -> tuple[str, ...]:
    """A prefix for a command that sees an empty disk of its own in the place of `path`."""
    mount = f'mount -t tmpfs -o size={size} none {shlex.quote(str(path))} && exec "$@"'
    return (*OWN_MOUNTS, "sh", "-c", mount, "sh")
