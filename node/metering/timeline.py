"""Timeline of one request, for its trace. Recorded only for requests that ask for it.

Spans at the head follow one another and nest: `request` holds `waiting` (for a place in a lane),
`prefill` with its `chunk`s, and a `step` for each token. In a step the head computes its `layers`,
is `away` while other machines have it, then computes the `head` (final norm and lm_head), and what
is left is `sampling`: choosing tokens and making text of them. Those of the other stages are, for
each trip round the ring, `wire`, `queue` (from the network's thread to the compute thread) and
`layers`, and a `wire` and a `queue` lead back to the head. Before each `wire` the machine that
sends has a `handing`: from the compute thread to the network's. Those of trips that guesses were
sent in, without waiting for the one before, say so.

To record `head` from `sampling`, both are waited for where MLX would go on: a traced token takes a
little longer than others.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import groupby

from node.metering.clocks import shifts
from node.metering.trips import Trip, Trips
from unicluster.v1.meters_pb2 import Span, Trace
from unicluster.v1.stage_pb2 import StageReport

# Time in which clocks are assumed not to drift apart.
DRIFT_SECONDS = 10.0

# Timelines of the requests that the running fiber computes for.
_RECORDING: ContextVar[tuple["Timeline", ...]] = ContextVar("recording", default=())


class Timeline:
    """The spans of one request, which came at `asked` of time.perf_counter."""

    def __init__(self, asked: float) -> None:
        self._asked = asked
        self._spans: list[Span] = []
        self._trips: dict[int, Trip] = {}
        self._guesses: set[int] = set()
        self._ring: Trips | None = None
        self._open: tuple[str, float] | None = None
        self._computed = 0.0  # when the last computing before the sampling was over

    def add(self, name: str, start: float, end: float, trip: int = 0) -> None:
        """Adds a span at the head, by time.perf_counter."""
        self._spans.append(self._span(name, 0, start, end, trip))
        if name in ("layers", "head"):
            self._computed = end

    def note(self, number: int, trip: Trip, ring: Trips) -> None:
        """Adds a returned frame by its number in the ring, before its reply is delivered."""
        # Copies: a part of a frame keeps all of it in memory.
        reports = [StageReport.FromString(r.SerializeToString()) for r in trip.reports]
        self._trips[number] = replace(trip, reports=reports)
        self._ring = ring

    def guess(self, number: int) -> None:
        """Notes that the frame of this number in the ring was sent ahead, for a guess."""
        self._guesses.add(number)

    def woke(self, number: int, now: float) -> None:
        """Records that the head continues with a returned frame."""
        trip = self._trips[number]
        self.add("away", trip.sent_s, now, number)
        self.add("queue", trip.returned_s, now, number)

    def begin(self, name: str) -> None:
        self._open, self._computed = (name, time.perf_counter()), 0.0

    def end(self) -> None:
        """Ends the span that was begun, if it has not ended yet."""
        if self._open is None:
            return
        (name, began), now = self._open, time.perf_counter()
        self.add(name, began, now)
        if name == "step" and self._computed:
            self.add("sampling", self._computed, now)
        self._open = None

    def to_wire(self) -> Trace:
        """The trace up to now; a span that is still open ends now."""
        self.end()
        end = time.perf_counter()
        self.add("request", self._asked, end)
        self._add_prefill()
        numbers = {number: index for index, number in enumerate(sorted(self._trips), start=1)}
        trace = Trace(machines=self._ring.machines if self._ring is not None else ["head"])
        spans = [*self._spans, *self._of_others()]
        for span in spans:
            span.guess = span.trip in self._guesses
            span.trip = numbers.get(span.trip, 0)
        # Only the head's nest. Others may take no time, and stay in their order.
        trace.spans.extend(
            sorted(spans, key=lambda s: (s.stage, s.start_s, s.stage == 0 and -s.duration_s))
        )
        return trace

    def _add_prefill(self) -> None:
        chunks = [span for span in self._spans if span.name == "chunk"]
        if chunks:
            last = max(chunks, key=lambda span: span.start_s)
            first = min(span.start_s for span in chunks)
            self._spans.append(
                Span(
                    name="prefill",
                    start_s=first,
                    duration_s=last.start_s + last.duration_s - first,
                )
            )

    def _of_others(self) -> Iterator[Span]:
        """Spans of the other stages and of the wire, by the head's clock."""
        if self._ring is None:
            return
        trips = sorted(self._trips.items())
        first = trips[0][1].sent_s
        for _, group in groupby(trips, lambda item: (item[1].sent_s - first) // DRIFT_SECONDS):
            together = list(group)
            differences = [_on_the_wire(trip) for _, trip in together]
            least = [min(hop) for hop in zip(*differences, strict=True)]
            ahead = shifts(least, self._ring.clocks.offsets)
            for number, trip in together:
                yield from self._of_trip(number, trip, ahead)

    def _of_trip(self, number: int, trip: Trip, ahead: Sequence[float]) -> Iterator[Span]:
        """Spans of one trip. `ahead`: clock shifts of each hop, as of `clocks.shifts`."""
        left, offset = trip.sent_s, 0.0
        handed = trip.handed()
        stops = zip(trip.reports, ahead, strict=False)
        for stage, (report, shift) in enumerate(stops, start=1):
            offset += shift
            arrived = report.arrived_s - offset
            started = arrived + report.queue_s
            gone = _between(left, left + handed[stage - 1], arrived)
            yield self._span("handing", stage - 1, left, gone, number)
            yield self._span("wire", stage, gone, arrived, number, report.received_bytes)
            yield self._span("queue", stage, arrived, started, number)
            left = started + report.compute_s
            layers = self._span("layers", stage, started, left, number)
            layers.skipped = report.skipped
            yield layers
        gone = _between(left, left + handed[-1], trip.returned_s)
        yield self._span("handing", len(trip.reports), left, gone, number)
        yield self._span("wire", 0, gone, trip.returned_s, number, trip.returned_bytes)

    def _span(
        self, name: str, stage: int, start: float, end: float, trip: int = 0, nbytes: int = 0
    ) -> Span:
        return Span(
            name=name,
            stage=stage,
            start_s=start - self._asked,
            duration_s=end - start,
            trip=trip,
            bytes=nbytes,
        )


def _on_the_wire(trip: Trip) -> list[float]:
    """Seconds for each hop from when its sending began, each by its machine's clock."""
    hops = zip(trip.differences(), trip.handed(), strict=True)
    return [difference - handed for difference, handed in hops]


def _between(first: float, moment: float, last: float) -> float:
    """A moment by another machine's clock, as far as it can be true."""
    return max(first, min(last, moment))


def recording() -> Sequence[Timeline]:
    """Timelines that record the current computation; nearly always none."""
    return _RECORDING.get()


@contextmanager
def recorded(name: str, timelines: Sequence[Timeline]) -> Iterator[None]:
    """Records the block, in this fiber, as a span in these timelines: a "chunk" or a "step"."""
    token = _RECORDING.set(tuple(timelines))
    for timeline in timelines:
        timeline.begin(name)
    try:
        yield
    finally:
        _RECORDING.reset(token)
        for timeline in timelines:
            timeline.end()
