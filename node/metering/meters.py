"""Counters of the generation: plain numbers that only grow.

Each meter is written by one thread and may be read from any.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from unicluster.v1 import meters_pb2 as wire

# Upper bounds in seconds: from a token of a small model to a long prompt's prefill.
BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
RECENT = 64


class Histogram:
    """Durations in seconds, counted by size."""

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def to_wire(self) -> wire.Histogram:
        return wire.Histogram(bounds=self.bounds, counts=self.counts, sum=self.sum)


class Recent:
    """The last durations, at most `most`, for a median that one slow moment doesn't change."""

    def __init__(self, most: int = RECENT) -> None:
        self._most = most
        self._values: list[float] = []
        self._count = 0

    def note(self, seconds: float) -> None:
        if self._count < self._most:
            self._values.append(seconds)
        else:
            self._values[self._count % self._most] = seconds
        self._count += 1

    @property
    def count(self) -> int:
        """Durations so far."""
        return self._count

    @property
    def median(self) -> float:
        """In seconds; 0 if there are none."""
        values = list(self._values)
        return median(values) if values else 0.0


@dataclass
class StageMeter:
    """Work of one machine. `decode`: compute seconds of frames with one token of one answer.

    growth: what each further token of the answer adds to those, as a part of them.
    disk_bytes: of prefixes on its disk. threads: that a token is computed with; 0: not known.
    `skipped`: of the frames, those that were cancelled before they were begun.
    """

    frames: int = 0
    busy_s: float = 0.0
    queue_s: float = 0.0
    skipped: int = 0
    decode: Recent = field(default_factory=Recent)
    growth: Recent = field(default_factory=Recent)
    disk_bytes: int = 0
    threads: int = 0

    def note_drafted(self, drafted: int, seconds: float) -> None:
        """Counts a frame with `drafted` tokens behind the first of one answer."""
        if single := self.decode.median:
            self.growth.note((seconds / single - 1) / drafted)

    def to_wire(self, machine: str) -> wire.StageMeter:
        return wire.StageMeter(
            machine=machine,
            frames=self.frames,
            busy_s=self.busy_s,
            queue_s=self.queue_s,
            skipped=self.skipped,
            decode_s=self.decode.median,
            disk_bytes=self.disk_bytes,
            threads=self.threads,
        )


@dataclass
class HopMeter:
    """Totals of all frames from one machine to the next: `seconds` and `bytes`."""

    frames: int = 0
    seconds: float = 0.0
    bytes: int = 0
    decode: Recent = field(default_factory=Recent)

    def to_wire(self) -> wire.HopMeter:
        return wire.HopMeter(
            frames=self.frames,
            seconds=self.seconds,
            bytes=self.bytes,
            decode_s=self.decode.median,
        )


@dataclass
class AnswerMeter:
    """Counters of the generation engine over all models. `ended` counts requests by their end.

    `step`: the head's seconds for one token of one answer, a lane's step without the time of the
    other machines.
    """

    time_to_first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    step: Recent = field(default_factory=Recent)
    ended: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "failed"), 0)
    )
    generated_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    disk_hits: int = 0
    disk_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens of prompts and answers that were computed, without reused ones."""
        return self.prompt_tokens - self.reused_tokens + self.generated_tokens

    def to_wire(self) -> wire.Meters:
        return wire.Meters(
            time_to_first_token=self.time_to_first_token.to_wire(),
            between_tokens=self.between_tokens.to_wire(),
            ended=self.ended,
            generated_tokens=self.generated_tokens,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            disk_hits=self.disk_hits,
            disk_tokens=self.disk_tokens,
        )
