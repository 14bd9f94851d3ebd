"""`unicluster doctor` sees who shares a machine's cores."""

import os
import subprocess
import sys
from typing import NoReturn

import psutil
import pytest

from node.doctor import processors
from node.doctor.finding import Level
from node.doctor.processors import THREADS_ENV, Use, cores, measured
from node.ggml import load
from tests.support.cluster import until


@pytest.mark.parametrize(
    ("use", "level", "said"),
    [
        (Use(8, 0.3), Level.OK, "other programs use 0.3 of 8"),
        (Use(8, 0.3, (0, 0)), Level.OK, "other programs use 0.3 of 8"),
        (Use(8, 4.0, (0,)), Level.WARNING, "other programs use 4.0 of 8: each token waits"),
        (Use(2, 0.0, (0, 0, 0)), Level.WARNING, "3 stages share 2 cores"),
        (Use(4, 0.0, (8,)), Level.WARNING, "8 threads are stated for 1 stage on 4 cores"),
        (Use(4, 0.0, (3, 3)), Level.WARNING, "6 threads are stated for 2 stages on 4 cores"),
        (Use(1, 0.0, (2,)), Level.WARNING, "2 threads are stated for 1 stage on 1 core:"),
    ],
)
def test_shared_cores_are_judged(use: Use, level: Level, said: str) -> None:
    finding = cores(use)

    assert finding.level is level
    assert finding.message.startswith(said)
    assert bool(finding.remedy) is (level is Level.WARNING)


def test_the_variable_is_that_of_stages() -> None:
    assert THREADS_ENV == load.THREADS_ENV


@pytest.mark.skipif(sys.platform != "linux", reason="another user's view of processes is Linux's")
def test_a_worker_is_no_other_program_and_its_threads_are_read() -> None:
    # Stands for a worker: its name is in its command line, and it computes without end.
    spinning = [sys.executable, "-c", "while True: pass", "node.worker"]
    environment = os.environ | {THREADS_ENV: "57"}
    before = measured(0.05).stages.count(57)
    process = subprocess.Popen(spinning, env=environment)
    try:
        use = until(lambda: _with(57, before + 1), "the worker is seen")
    finally:
        process.kill()
        process.wait()

    assert use.cores >= 1
    assert use.others >= 0
    assert cores(use).level is Level.WARNING
    assert measured(0.05).stages.count(57) == before


@pytest.mark.parametrize("error", [psutil.NoSuchProcess(1), psutil.AccessDenied(1)])
def test_a_worker_that_can_t_be_read_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, error: psutil.Error
) -> None:
    """It ended meanwhile, or is another user's."""

    class Unreadable(psutil.Process):
        def cmdline(self) -> list[str]:
            return [processors.WORKER]

        def cpu_times(self) -> NoReturn:
            raise error

        def environ(self) -> NoReturn:
            raise error

    monkeypatch.setattr(psutil, "process_iter", lambda: iter([Unreadable()]))

    assert measured(0.01).stages == ()


def _with(threads: int, count: int) -> Use | None:
    use = measured(0.05)
    return use if use.stages.count(threads) == count else None
