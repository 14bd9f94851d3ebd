"""A worker process as its starter sees it: events, last output, and why it ended."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from node.worker.config import WorkerConfig
from node.worker.environment import worker_environment
from node.worker.lines import LineReader
from node.worker.report import WorkerReport
from unicluster.causes import Cause, of_exit
from unicluster.deadlines import floor_seconds
from unicluster.program import module_command
from unicluster.stall import Stall, look_seconds

log = logging.getLogger("unicluster.worker")

# Gets the number of the file descriptor that its events go to as its last argument.
COMMAND = tuple(module_command("node.worker"))

STOP_SECONDS = 5.0
# A worker that ends closes its channel a moment before it is gone.
CLOSED_SECONDS = 5.0
# For the last bytes of a process that has ended. Its children may hold the pipes open for longer.
DRAIN_SECONDS = 1.0
REASON_CHARS = 500
# Of silence until a worker is ended, in times that any work may take: it reports every second that
# it lives, but for imports at its start.
SILENT_FLOORS = 2.0
SILENT_START_FLOORS = 6.0

# Printed by MLX, Metal or the C++ runtime when an allocation fails.
_OUT_OF_MEMORY = ("unable to allocate", "insufficient memory", "bad_alloc", "memoryerror")


@dataclass(frozen=True)
class Exit:
    """Why a worker ended, in one line, with the end of what it logged and printed.

    cause: a word of Cause, or of a newer worker's.
    """

    reason: str
    stderr_tail: tuple[str, ...]
    out_of_memory: bool
    cause: str = ""


class WorkerProcess:
    """One child process. `events` ends when the process does; then `exit` says why.

    It imports its libraries and waits until it is configured.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        report: WorkerReport,
        transports: Sequence[asyncio.BaseTransport],
        folder: "tempfile.TemporaryDirectory[str]",
    ) -> None:
        """`transports`: this end of the worker's pipes. `folder`: its working directory."""
        self._process = process
        self._report = report
        self._transports = transports
        self._folder = folder
        self._stopped = False
        self._configured = asyncio.Event()
        self._kills_before = _oom_kills()
        self._ending = asyncio.create_task(self._end())

    @classmethod
    async def start(
        cls,
        config: WorkerConfig,
        command: Sequence[str] = COMMAND,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> "WorkerProcess":
        """Starts a worker, with `extra` variables in its environment.

        Its certificate goes through a socket, never the command line.
        """
        worker = await cls.prepare(command, extra)
        worker.configure(config)
        return worker

    @classmethod
    async def prepare(
        cls,
        command: Sequence[str] = COMMAND,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> "WorkerProcess":
        """Starts a worker that does nothing more than to import its libraries; as `start`."""
        report = WorkerReport("a worker without a stage")
        loop = asyncio.get_running_loop()
        # Not asyncio's own pipes, with which it waits for the worker's children as well.
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            ours_in, stdin = socket.socketpair()
            theirs.callback(stdin.close)
            to_stdin, _ = await loop.create_unix_connection(asyncio.Protocol, sock=ours_in)
            ours.callback(to_stdin.close)
            channel, events = await _read_pipe(report.channel)
            theirs.callback(os.close, channel)
            ours.callback(events.close)
            output, printed = await _read_pipe(report.output)
            theirs.callback(os.close, output)
            ours.callback(printed.close)
            folder = tempfile.TemporaryDirectory(prefix="unicluster-worker-")
            ours.callback(folder.cleanup)
            process = await asyncio.create_subprocess_exec(
                *(*command, str(channel)),
                stdin=stdin.fileno(),
                stdout=output,
                stderr=output,
                pass_fds=(channel,),
                start_new_session=True,  # Ctrl-C in the terminal is for the agent, which stops us
                env=worker_environment(extra),
                cwd=folder.name,
            )
            worker = cls(process, report, (to_stdin, events, printed), folder)
            ours.pop_all()
        return worker

    @property
    def is_waiting(self) -> bool:
        """Whether it runs and may be configured."""
        return self._process.returncode is None and not (
            self._configured.is_set() or self._stopped or self._report.broken.is_set()
        )

    def configure(self, config: WorkerConfig) -> None:
        """Has it load and serve a stage; once."""
        spec = config.spec
        self._report.name = f"{config.node}, layers {spec.first_layer}-{spec.end_layer - 1}"
        self._kills_before = _oom_kills()
        self._configured.set()
        giving = self._stdin
        # A worker that ended at once has closed its end; `exit` says why.
        if not giving.is_closing():
            # Not drained: it is small, and a caller cancelled here would leave the worker behind.
            giving.write(config.to_line())

    def renew(self, identity: dict[str, str]) -> None:
        """Hands the worker a new certificate, in place of the one it has."""
        giving = self._stdin
        if not giving.is_closing():
            giving.write(json.dumps(identity).encode() + b"\n")

    @property
    def _stdin(self) -> asyncio.WriteTransport:
        # uvloop's transports have another class, with the same methods.
        return cast(asyncio.WriteTransport, self._transports[0])

    @property
    def pid(self) -> int:
        return self._process.pid

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events that the worker reports: fetching, progress, ready, tokens, failed."""
        return self._report.events()

    async def exit(self) -> Exit:
        """Waits for the end of the process and returns its reason."""
        code = await self._process.wait()
        await asyncio.shield(self._ending)
        tail = self._report.tail
        killed = code == -signal.SIGKILL and _oom_kills() > self._kills_before
        printed = any(words in line.lower() for words in _OUT_OF_MEMORY for line in tail)
        if self._report.failure is not None:
            reason = self._report.failure
        elif self._stopped:
            reason = "stopped"
        elif killed:
            reason = "killed by the system for lack of memory"
        elif code < 0:
            reason = f"ended by signal {-code} ({signal.Signals(-code).name})"
            if code == -signal.SIGABRT and (last := self._report.last_printed):
                reason += f": {last[:REASON_CHARS]}"  # a library says why it aborts
        else:
            reason = f"exited with code {code}"
            if last := self._report.last_printed or "".join(tail[-1:]):
                reason += f": {last[:REASON_CHARS]}"
        out_of_memory = killed or (printed and not self._stopped)
        cause = self._report.cause if self._report.failure is not None else ""
        if out_of_memory or not cause:
            cause = of_exit(code, tail, out_of_memory=out_of_memory)
        return Exit(reason, tail, out_of_memory, cause)

    async def stop(self) -> None:
        """Ends the process, gently for a few seconds, and waits until it is gone."""
        self._stopped = True
        await self._terminate()
        await asyncio.shield(self._ending)

    async def _terminate(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
        await self._process.wait()

    async def _end(self) -> None:
        """Closes the events when the process ends, and ends a process whose channel has broken."""
        try:
            await self._ended()
        finally:
            for transport in self._transports:
                transport.close()
            self._report.end()
            await asyncio.to_thread(self._folder.cleanup)

    async def _ended(self) -> None:
        report = self._report
        exited = asyncio.create_task(self._process.wait())
        waiting = [
            asyncio.create_task(report.broken.wait()),
            asyncio.create_task(report.channel.closed.wait()),
            asyncio.create_task(self._break_off_silent()),
        ]
        await asyncio.wait([exited, *waiting], return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not report.broken.is_set():
            await asyncio.wait([exited], timeout=CLOSED_SECONDS)
        if not exited.done():
            report.break_off("closed its event channel, and did not end")
            await self._terminate()
        await exited
        closed = (report.channel.closed.wait(), report.output.closed.wait())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closed), DRAIN_SECONDS)

    async def _break_off_silent(self) -> None:
        """Breaks the channel off once nothing has come through it for too long."""
        await self._configured.wait()  # until then nothing is expected of it
        report, stall = self._report, Stall()
        while not report.broken.is_set():
            await asyncio.sleep(look_seconds())
            silent_s = stall.look(report.heard)
            floors = SILENT_FLOORS if report.heard else SILENT_START_FLOORS
            if silent_s > floors * floor_seconds():
                doing = report.doing or "starting"
                reason = f"has said nothing for {silent_s:.0f} s while {doing}"
                report.break_off(reason, Cause.FROZEN)


async def _read_pipe(reader: LineReader) -> tuple[int, asyncio.ReadTransport]:
    """A new pipe that `reader` reads: the file descriptor to write to, and the reading end."""
    source, sink = os.pipe()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: reader, os.fdopen(source, "rb", 0))
    return sink, transport


def _oom_kills() -> int:
    """Processes killed for lack of memory so far, on this machine or in its control group.

    The kernel counts both on Linux; 0 elsewhere.
    """
    return _count(Path("/proc/vmstat")) + _count(_own_group() / "memory.events")


def _own_group() -> Path:
    """The folder of this process's control group (v2), whose memory limit may be the one hit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    return Path("/sys/fs/cgroup") / path.strip("/")


def _count(file: Path) -> int:
    try:
        text = file.read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0
    )
