"""Deadlines of work, learned from the times that such work took here.

A slow machine is not a dead one: work counts as stuck only after a multiple of the longest time
seen lately for its kind and size, and never before a floor. Until a kind was measured, the
deadline is what the plan predicts, generously.
"""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from unicluster.v1.node_pb2 import LoadProgress

VARIABLE = "UNICLUSTER_STUCK_SECONDS"
# Work may always take so long, whatever was measured: a machine swaps, or compiles kernels.
FLOOR_SECONDS = 30.0
# Of the median of the times seen. A machine that is busy otherwise is slower by less.
MULTIPLE = 20.0
# Of the longest of them.
WORST_MULTIPLE = 4.0
# Of a time predicted and never measured: the first frame also pages weights in.
FIRST_MULTIPLE = 200.0
FIRST_FLOORS = 4.0
# Nobody has planned what unicluster.load computes: so many tokens more take as long again.
UNPREDICTED_TOKENS = 64
# Measured times that count, of each kind and size.
REMEMBERED = 64
# Bytes a second that a disk or a network file system gives at the very least.
SLOWEST_DISK = 10e6
# To connect to a stage of a ring, and for each one behind it: the nearest to the trouble says so
# first.
OPEN_SECONDS = 5.0
OPEN_SECONDS_A_STAGE = 2.0
# The bytes of the largest layer over those of the mean.
UNEVEN_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a kind: prefill, decode, load, and others. size: tokens, or bytes for `load`."""

    kind: str
    size: int = 1

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} tokens" if self.kind == PREFILL else self.kind


PREFILL, LOAD = "prefill", "load"
DECODE = Work("decode")
OTHER = Work("other work")


def floor_seconds() -> float:
    """Seconds that any work may take: UNICLUSTER_STUCK_SECONDS, or FLOOR_SECONDS."""
    try:
        return max(float(os.environ.get(VARIABLE, "")), 0.1)
    except ValueError:
        return FLOOR_SECONDS


def open_seconds(stages: int) -> float:
    """Seconds in which a stream through so many stages is opened."""
    return OPEN_SECONDS + OPEN_SECONDS_A_STAGE * stages


def next_bytes(progress: LoadProgress, memory: int) -> int:
    """The most bytes that come before the next report of progress; of a stage of `memory`."""
    if progress.to_fetch and progress.fetched < progress.to_fetch:
        return progress.to_fetch  # a file of that size may be compared with its checksum
    if not progress.bytes_total or not progress.layers_total:
        return memory
    left = max(progress.bytes_total - progress.bytes_done, 0)
    if progress.layers_done >= progress.layers_total:  # what is outside the layers
        return left
    return min(left, UNEVEN_LAYERS * progress.bytes_total // progress.layers_total)


class WorkDeadlines:
    """The seconds after which work that has not ended is stuck.

    predicted: seconds for one token of a kind, as planned. Noted on one thread; any may ask.
    """

    def __init__(self, predicted: Mapping[str, float] | None = None) -> None:
        self._floor = floor_seconds()
        self._predicted = dict(predicted or {})
        # By kind and power of two of the size: a few tokens take longer each than many do.
        self._seen: dict[tuple[str, int], deque[float]] = {}

    def note(self, work: Work, seconds: float) -> None:
        """Records how long some work took, successful or not."""
        key = work.kind, work.size.bit_length()
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = deque(maxlen=REMEMBERED)
        seen.append(seconds)

    def limit(self, work: Work) -> float:
        """Seconds that `work` may take."""
        first = self._floor * FIRST_FLOORS
        if work.kind == LOAD:  # one layer may be in the page cache, and the next on a slow disk
            return first + work.size / SLOWEST_DISK
        size = work.size.bit_length()
        if (of_size := self._allowed(work.kind, size)) is not None:
            return max(self._floor, of_size)
        if predicted := self._predicted.get(work.kind, 0.0):
            return max(first, FIRST_MULTIPLE * predicted * work.size)
        return first * (1 + work.size / UNPREDICTED_TOKENS)

    def _allowed(self, kind: str, size: int) -> float | None:
        """Multiple of the times of that size, or of the nearest one, as if they were of this."""
        sizes = [bits for seen_kind, bits in list(self._seen) if seen_kind == kind]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda bits: (abs(bits - size), bits))
        seen = sorted(self._seen[kind, nearest])
        longest = max(MULTIPLE * seen[len(seen) // 2], WORST_MULTIPLE * seen[-1])
        return float(longest * 2 ** max(size - nearest, 0))
