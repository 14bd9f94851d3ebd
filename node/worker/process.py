"""A worker as seen by whoever started it: its events, its last words, and why it ended."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from node.worker.config import WorkerConfig

log = logging.getLogger("unicluster.worker")

STDERR_LINES = 20
STOP_SECONDS = 5.0

# What MLX, Metal and the C++ runtime say when an allocation fails.
_OUT_OF_MEMORY = ("unable to allocate", "insufficient memory", "bad_alloc", "memoryerror")


@dataclass(frozen=True)
class Exit:
    """Why a worker ended, in one line, with the end of what it wrote to standard error."""

    reason: str
    stderr_tail: tuple[str, ...]
    out_of_memory: bool


class WorkerProcess:
    """One child process. `events` ends when the process does; then `exit` says why."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name
        self._tail: deque[str] = deque(maxlen=STDERR_LINES)
        self._failure: str | None = None
        self._stopped = False
        self._kills_before = _oom_kills()
        self._reader = asyncio.create_task(self._read_stderr())

    @classmethod
    async def start(cls, config: WorkerConfig) -> "WorkerProcess":
        """Starts a worker. Its certificate goes through the pipe, never the command line."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "node.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the agent, which stops us
            env=_environment(),
        )
        worker = cls(process, f"{config.node}, layers {config.first_layer}-{config.end_layer - 1}")
        # One that ended at once has closed its pipe; `exit` tells why it ended.
        if process.stdin is not None and not process.stdin.is_closing():
            # Not drained: it is small, and who is cancelled here would leave the worker behind.
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What the worker tells: progress, ready, failed."""
        if self._process.stdout is None:
            return
        async for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "failed":
                self._failure = event["reason"]
            yield event

    async def exit(self) -> Exit:
        """Waits for the end of the process and says why it came."""
        code = await self._process.wait()
        await self._reader
        tail = tuple(self._tail)
        killed = code == -signal.SIGKILL and _oom_kills() > self._kills_before
        said = any(words in line.lower() for words in _OUT_OF_MEMORY for line in tail)
        if self._failure is not None:
            reason = self._failure
        elif self._stopped:
            reason = "stopped"
        elif killed:
            reason = "killed by the system for lack of memory"
        elif code < 0:
            reason = f"ended by signal {-code} ({signal.Signals(-code).name})"
        else:
            reason = f"exited with code {code}"
            if tail:
                reason += f": {tail[-1]}"
        return Exit(reason, tail, killed or (said and not self._stopped))

    async def stop(self) -> None:
        """Ends the process, gently for a few seconds, and waits until it is gone."""
        self._stopped = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
        await self._process.wait()
        await self._reader

    async def _read_stderr(self) -> None:
        if self._process.stderr is None:
            return
        async for raw in self._process.stderr:
            line = raw.decode(errors="replace").rstrip()
            self._tail.append(line)
            log.info("[%s] %s", self._name, line)


def _environment() -> dict[str, str]:
    """This process's environment, with the project importable wherever the agent was started."""
    root = str(Path(__file__).parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    path = os.pathsep.join(path for path in paths if path)
    return {**os.environ, "PYTHONPATH": path}


def _oom_kills() -> int:
    """Processes the Linux kernel has killed for lack of memory since boot; 0 elsewhere."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0
    )
