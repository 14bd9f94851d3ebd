"""A control group for each host. In one together, their systemds would remove each other's."""

import contextlib
import os
from pathlib import Path

from tests.support.cluster import until

# Puts itself into the groups before `--`, and becomes the command behind it.
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'


class ControlGroup:
    """Below ours, in the hierarchies that systemd keeps its services in."""

    def __init__(self, name: str) -> None:
        self._folders = [folder / name for folder in _ours()]
        for folder in self._folders:
            folder.mkdir()

    def inside(self, *command: str) -> list[str]:
        """The command, as it runs in the group."""
        return ["sh", "-c", _ENTER, "sh", *map(str, self._folders), "--", *command]

    def remove(self) -> None:
        """When its processes were sent the signal to end."""
        until(lambda: all(map(_removed, self._folders)), "its control groups are empty")


def _ours() -> list[Path]:
    """Our folder in each hierarchy of systemd's: the unified one, and its own of version 1."""
    paths = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    folders = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2" and "" in paths:
            folders.append(Path(target + paths[""]))
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            folders.append(Path(target + paths["name=systemd"]))
    return folders


def _removed(folder: Path) -> bool:
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # busy: a process is still ending
            Path(path).rmdir()
    return not folder.exists()
