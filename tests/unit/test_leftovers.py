"""A test run that is killed leaves no process behind."""

import os
import signal
import subprocess
import sys

import psutil

from tests.support import leftovers
from tests.support.cluster import ROOT, until
from tests.support.deadlines import scaled

# It starts a program as tests do, in a session of its own, and is then killed.
KILLED = """
import os, signal, subprocess, sys
from tests.support import leftovers
leftovers.watch()
words = [sys.executable, "-c", "import signal; signal.pause()"]
print(subprocess.Popen(words, start_new_session=True).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
signal.pause()
"""


def test_what_a_killed_run_has_started_ends() -> None:
    words = [sys.executable, "-c", KILLED]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=scaled(60))
    assert run.returncode == -signal.SIGKILL
    until(lambda: not psutil.pid_exists(int(run.stdout)), "the end of its program")


def test_what_does_not_listen_is_killed_and_others_stay() -> None:
    run = f"{os.getpid()} of this test"
    environ = os.environ | {leftovers.MARK: run}
    words = [sys.executable, "-c", DEAF]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, env=environ) as deaf,
        subprocess.Popen(words, stdout=subprocess.PIPE) as other,
    ):
        for program in (deaf, other):
            assert program.stdout is not None
            program.stdout.readline()
        leftovers.end(run, orderly_s=0.1)
        assert deaf.wait(scaled(30)) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
