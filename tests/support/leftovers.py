"""Ends what a test run has started, also where the run itself is killed.

pytest-xdist kills a worker that takes long to tear its fixtures down, as one does on a busy
machine after Ctrl-C, and programs that tests start have sessions of their own.
"""

import os
import subprocess
import sys

import psutil

# In the environment of every process that a test starts: the process id of the run.
MARK = "UNICLUSTER_TESTS_RUN"
# For what ends in order when it is asked to.
ORDERLY_S = 10.0


# Held, because its pipe closes with it.
_watcher: "subprocess.Popen[bytes] | None" = None


def watch() -> None:
    """Starts a process that ends all descendants of this one once this one is gone."""
    global _watcher
    os.environ[MARK] = str(os.getpid())
    environ = {name: value for name, value in os.environ.items() if name != MARK}
    _watcher = subprocess.Popen(
        [sys.executable, "-m", __name__, os.environ[MARK]],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environ,
        start_new_session=True,
    )


def marked(run: str) -> list[psutil.Process]:
    """The processes that are left of the run with this process id."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == run:
                found.append(process)
        except psutil.Error:  # it ended, or is not ours to read
            continue
    return found


def end(run: str, orderly_s: float = ORDERLY_S) -> None:
    """Ends what is left of a run: in order, then by force."""
    left = marked(run)
    for process in left:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, orderly_s)
    for process in marked(run):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.stdin.read()  # until the run is gone
    end(sys.argv[1])
