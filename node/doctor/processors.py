"""Check of `unicluster doctor` on a machine's cores: who else computes on them."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from node.doctor.finding import Finding, Level
from unicluster.units import counted

# node.ggml.load has it too, and imports what this command does without.
THREADS_ENV = "UNICLUSTER_GGML_THREADS"
WORKER = "node.worker"
# Of this time the shares of the cores are.
WATCHED_S = 0.5
# Of the cores, in use by other programs.
MUCH = 0.25


@dataclass(frozen=True)
class Use:
    """cores: of the machine, or those of them that this process may use. others: how many of them
    other programs use. stages: the number of threads stated for each one's worker, 0 where it
    finds it by itself.
    """

    cores: int
    others: float
    stages: Sequence[int] = ()


def cores(use: Use) -> Finding:
    """Finding about stages that share cores with one another, or with other programs."""
    subject, count = "cores", len(use.stages)
    stated = sum(use.stages)
    if stated > use.cores:
        return Finding(
            Level.WARNING,
            subject,
            f"{stated} threads are stated for {counted(count, 'stage')} on "
            f"{counted(use.cores, 'core')}: they wait for one another",
            f"unset {THREADS_ENV} for the agent: a stage tries out how many are fastest",
        )
    if count > use.cores:
        return Finding(
            Level.WARNING,
            subject,
            f"{count} stages share {counted(use.cores, 'core')}",
            "one agent a machine is enough: end the others, or serve over fewer with --nodes",
        )
    used = f"other programs use {use.others:.1f} of {use.cores}"
    if use.others > MUCH * use.cores:
        return Finding(
            Level.WARNING,
            subject,
            f"{used}: each token waits for them",
            "end what need not run beside a stage; `top` shows what it is",
        )
    return Finding(Level.OK, subject, used)


def measured(seconds: float = WATCHED_S) -> Use:
    """How the cores of this machine are used, watched for some time."""
    workers = list(_workers())
    before = {}
    for worker in workers:
        with contextlib.suppress(psutil.Error):  # it ended, or is another user's
            before[worker] = worker.cpu_times()
    total, began = psutil.cpu_times(), time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - began
    busy = _busy(psutil.cpu_times()) - _busy(total)
    for worker, times in before.items():
        with contextlib.suppress(psutil.Error):
            now = worker.cpu_times()
            busy -= now.user + now.system - times.user - times.system
    stated = []
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            threads = worker.environ().get(THREADS_ENV, "")
            stated.append(int(threads) if threads.isdecimal() else 0)
    return Use(_cores(), max(busy / passed, 0.0), tuple(stated))


def _workers() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if WORKER in process.cmdline():
                yield process


def _busy(times: object) -> float:
    """Seconds in which cores were at work for this machine."""
    at_rest = ("idle", "iowait", "steal", "guest", "guest_nice")
    fields: dict[str, float] = times._asdict()  # type: ignore[attr-defined]
    return sum(seconds for name, seconds in fields.items() if name not in at_rest)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
