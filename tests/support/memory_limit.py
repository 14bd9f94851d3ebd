"""A control group with little memory: the kernel ends whoever wants more. For root on Linux."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.cluster import until

# By the version of the hierarchy: where groups are made, and the file of the limit.
_VERSIONS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


def _place() -> tuple[Path, str] | None:
    for folder, file in _VERSIONS:
        known = folder / "cgroup.controllers"
        has_it = file == "memory.limit_in_bytes" or (
            known.exists() and "memory" in known.read_text().split()
        )
        if (folder / "cgroup.procs").exists() and has_it and os.access(folder, os.W_OK):
            return folder, file
    return None


def can_limit_memory() -> bool:
    try:
        with memory_limit(1 << 20):
            return True
    except (OSError, LookupError):
        return False


@contextlib.contextmanager
def memory_limit(count: int) -> Iterator[Callable[[int], None]]:
    """Puts processes, by their ids, where there are only so many bytes more for them."""
    place = _place()
    if place is None:
        raise LookupError("no hierarchy of control groups with memory")
    folder, file = place
    group = folder / f"unicluster-{os.getpid()}"
    group.mkdir()

    def limited(pid: int) -> None:
        (group / "cgroup.procs").write_text(str(pid))

    try:
        (group / file).write_text(str(count))
        yield limited
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the limited processes are gone")
        group.rmdir()
