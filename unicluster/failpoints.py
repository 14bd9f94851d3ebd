"""Failpoints: named places of the code where a test makes something go wrong.

UNICLUSTER_FAILPOINTS="stage.compute=hang@3;worker.load=delay(500)" makes the third frame of a
stage hang, and each load half a second longer. Actions: `panic` ends the process at once,
`error(text)` raises FailpointError, `delay(ms)` and `hang` wait, `freeze` waits and keeps the
interpreter, so that no other thread of the process runs Python. `@n`: at the nth time that the
place is reached, and no other; `@n+`: from then on. Nothing happens without the variable.

UNICLUSTER_FAILPOINTS=@FILE takes them from a file, whenever it is replaced, so that a test can arm
a process that runs; no file, no failpoints.
"""

import asyncio
import ctypes
import logging
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

VARIABLE = "UNICLUSTER_FAILPOINTS"
# Seconds of `hang`: years.
FOR_EVER = 1e8
# Between two looks at a file of failpoints.
LOOK_SECONDS = 0.1
# What a process that panics exits with.
PANIC_CODE = 86

_ENTRY = re.compile(
    r"(?P<name>[a-z_.]+)=(?P<action>panic|hang|freeze|delay\((?P<ms>\d+)\)|error(\((?P<text>[^)]*)\))?)"
    r"(@(?P<nth>[1-9]\d*)(?P<on>\+)?)?"
)


class FailpointError(Exception):
    """Raised at a failpoint whose action is `error`; no error of the product's own."""


@dataclass
class _Failpoint:
    """seconds: of a delay, without end for `hang`. nth: 0 for every time."""

    name: str
    action: str
    seconds: float
    text: str
    nth: int
    from_then_on: bool
    _hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def is_due(self) -> bool:
        with self._lock:
            self._hits += 1
            return self._hits == self.nth or (self._hits > self.nth and self.from_then_on)

    def act(self) -> float:
        """Ends the process, raises, or returns the seconds to wait."""
        if self.action == "panic":
            # Not by the log, which a thread may write that does not live to do so.
            os.write(2, f"at failpoint {self.name}: panic\n".encode())
            os._exit(PANIC_CODE)
        log.warning("failpoint %s: %s", self.name, self.action)
        if self.action == "freeze":
            ctypes.PyDLL(None).sleep(int(FOR_EVER))  # a PyDLL's functions keep the GIL
        if self.action.startswith("error"):
            raise FailpointError(self.text or self.name)
        return self.seconds


def parse(text: str) -> dict[str, _Failpoint]:
    """Failpoints by name. Raises ValueError for text of another form."""
    made = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{VARIABLE}: {entry!r} is no failpoint")
        ms = match["ms"]
        made[match["name"]] = _Failpoint(
            name=match["name"],
            action=match["action"],
            seconds=int(ms) / 1000 if ms is not None else FOR_EVER,
            text=match["text"] or "",
            nth=int(match["nth"] or 0),
            from_then_on=match["nth"] is None or match["on"] is not None,
        )
    return made


class _Armed(dict[str, _Failpoint]):
    """Failpoints by name, from a file that is looked at now and then."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._looked = 0.0
        self._mark: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """True: any place may be armed later."""
        return True

    def get(self, name: str, default: Any = None) -> Any:
        with self._lock:
            if (now := time.monotonic()) - self._looked > LOOK_SECONDS:
                self._looked = now
                self._look()
            return super().get(name, default)

    def _look(self) -> None:
        try:
            found = self._path.stat()
            mark, text = (found.st_ino, found.st_mtime_ns), self._path.read_text()
        except FileNotFoundError:
            mark, text = None, ""
        if mark != self._mark:
            self._mark = mark
            self.clear()
            self.update(parse(text))


def _of_environment(text: str) -> dict[str, _Failpoint]:
    return _Armed(Path(text[1:])) if text.startswith("@") else parse(text)


_points = _of_environment(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """The place `name` of a thread is reached: acts if a test wants it."""
    if _points and (point := _points.get(name)) is not None and point.is_due():
        time.sleep(point.act())


async def reach_async(name: str) -> None:
    """The place `name` of an event loop is reached, which goes on while this waits."""
    if _points and (point := _points.get(name)) is not None and point.is_due():
        await asyncio.sleep(point.act())
