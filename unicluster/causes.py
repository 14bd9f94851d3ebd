"""Kinds of losses, told apart by signals, kernel counters, error numbers, and the last lines.

Stable words: in events, metrics and messages of machines.
"""

import errno
import signal
from collections.abc import Iterable
from enum import StrEnum


class Cause(StrEnum):
    """Why a stage or a machine was lost."""

    KILLED = "killed"  # by a signal that somebody sent
    OUT_OF_MEMORY = "out of memory"
    FROZEN = "frozen"  # it lives, and does no work
    UNREACHABLE = "unreachable"  # no answer: asleep, off the network, or without power
    ASLEEP = "asleep"  # as a machine says before, or as its clocks tell once it is back
    LEFT = "left"  # its agent ended or hung up
    DISK_FULL = "disk full"
    DRIVER_FAULT = "driver fault"
    CRASHED = "crashed"
    FAILED = "failed"  # it says why
    DRAINED = "drained"


_KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
# Printed or raised by CUDA, ROCm, Vulkan and Metal when a card or its driver has failed.
_DRIVER = (
    *("cuda error", "cudaerror", "cuda_error", "nccl error", "nvrm: xid", "hip error", "hiperror"),
    *("hsa_status_error", "gpu hang", "vk_error_device_lost", "device lost", "errordevicelost"),
    *("command buffer execution failed", "kiogpucommandbuffercallbackerror", "ggml_cuda_error"),
)
_NO_SPACE = "no space left on device"


def of_error(error: BaseException) -> Cause | None:
    """The cause that an error's chain shows; None where it shows none."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, MemoryError):
            return Cause.OUT_OF_MEMORY
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return Cause.DISK_FULL
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return Cause.OUT_OF_MEMORY
        link = link.__cause__ or link.__context__
    return of_lines([str(error)])


def of_lines(lines: Iterable[str]) -> Cause | None:
    """The cause that printed lines name; None where they name none."""
    text = "\n".join(lines).lower()
    if _NO_SPACE in text:
        return Cause.DISK_FULL
    return Cause.DRIVER_FAULT if any(words in text for words in _DRIVER) else None


def of_exit(code: int, lines: Iterable[str], *, out_of_memory: bool) -> Cause:
    """Why a process ended: by its exit code (negative: a signal) and its last lines."""
    if out_of_memory:
        return Cause.OUT_OF_MEMORY
    if code < 0 and -code in _KILLS:
        return Cause.KILLED
    return of_lines(lines) or Cause.CRASHED
