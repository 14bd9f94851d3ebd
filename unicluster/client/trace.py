"""Timeline of a request, as a file for chrome://tracing or https://ui.perfetto.dev."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicluster.errors import InputError
from unicluster.v1 import meters_pb2 as wire

# What may overlap on one machine: a frame waits or travels while others are computed on.
OVERLAPPING = {"handing", "wire", "queue"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took `duration_s`, from `start_s` after the request came to the head.

    At the head (stage 0) `request` holds `waiting`, `prefill` with its `chunk`s, and `step`s. A
    step holds `layers`, `away` (other machines have it; at its end a `queue`), `head` (final norm
    and lm_head) and `sampling`. Other stages have a `wire`, a `queue` and `layers` for each `trip`
    round the ring, and a `wire` leads back to the head; before each, whoever sends has a `handing`:
    the frame waits for the network's thread. `bytes` is the hidden state on a wire.
    guess: its trip was sent ahead, for a guess. skipped: of layers, as that was known to be wrong.
    """

    name: str
    stage: int
    start_s: float
    duration_s: float
    trip: int = 0
    bytes: int = 0
    guess: bool = False
    skipped: bool = False

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Trace:
    """The spans of one request, by stage and start. `machines` are by stage, the head first."""

    machines: tuple[str, ...]
    spans: tuple[Span, ...]

    def chrome(self) -> dict[str, Any]:
        """The JSON object form of Chrome's trace event format: a process is a machine."""
        return {
            "traceEvents": [*self._names(), *(e for span in self.spans for e in _events(span))],
            "displayTimeUnit": "ms",
        }

    def save(self, path: str | Path) -> None:
        """Writes it to a file. Raises InputError when that can't be."""
        try:
            Path(path).write_text(json.dumps(self.chrome()), "utf-8")
        except OSError as error:
            raise InputError(f"{path} can't be written: {error.strerror}") from error

    def _names(self) -> Iterator[dict[str, Any]]:
        for stage, machine in enumerate(self.machines):
            name = f"{machine} (head)" if stage == 0 else machine
            thread = "request" if stage == 0 else "stage"
            yield _named("process_name", stage, name=name)
            yield _named("process_sort_index", stage, sort_index=stage)
            yield _named("thread_name", stage, name=thread)


def from_wire(trace: wire.Trace) -> Trace:
    return Trace(
        tuple(trace.machines),
        tuple(
            Span(s.name, s.stage, s.start_s, s.duration_s, s.trip, s.bytes, s.guess, s.skipped)
            for s in trace.spans
        ),
    )


def _named(what: str, stage: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": stage, "tid": 0, "args": args}


def _events(span: Span) -> Iterator[dict[str, Any]]:
    args = {"trip": span.trip} if span.trip else {}
    args |= {"bytes": span.bytes} if span.bytes else {}
    args |= {"guess": True} if span.guess else {}
    args |= {"skipped": True} if span.skipped else {}
    event = {"name": span.name, "cat": "unicluster", "pid": span.stage, "tid": 0, "args": args}
    start, end = span.start_s * 1e6, span.end_s * 1e6  # microseconds
    if span.name not in OVERLAPPING:
        yield event | {"ph": "X", "ts": start, "dur": end - start}
        return
    event["id"] = f"{span.stage} {span.name} {span.trip}"
    yield event | {"ph": "b", "ts": start}
    yield event | {"ph": "e", "ts": end}
