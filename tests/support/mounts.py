"""Disks and directories that one process sees in its own way: for root of a Linux machine."""

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

OWN_MOUNTS = ("unshare", "--mount")


def can_mount() -> bool:
    tried = [*OWN_MOUNTS, "true"]
    has_it = shutil.which("unshare") is not None
    return has_it and subprocess.run(tried, capture_output=True, check=False).returncode == 0


def behind_a_disk(path: Path, size: str = "1m") -> tuple[str, ...]:
    """A prefix for a command that sees an empty disk of its own in the place of `path`."""
    mount = f'mount -t tmpfs -o size={size} none {shlex.quote(str(path))} && exec "$@"'
    return (*OWN_MOUNTS, "sh", "-c", mount, "sh")


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path | None]:
    """A disk of its own, for this machine to fill; None where it can't be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room of a disk; the file that has it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


@contextlib.contextmanager
def formatted_disk(image: Path, kind: str, size: int) -> Iterator[Path | None]:
    """A disk of `size` bytes in a file, with a file system; None where it can't be made."""
    maker, folder = shutil.which(f"mkfs.{kind}"), image.with_suffix(".mount")
    if maker is None or os.geteuid():
        yield None
        return
    with image.open("wb") as stream:
        stream.truncate(size)
    folder.mkdir()
    for command in ([maker, "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            yield None
            return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
