"""Trips: frames that came back to the head, and the times of stages and hops they show.

Each stage writes into a frame when it arrived, by the stage's clock, how long it waited and how
long it was computed on. The rest of the round trip is the hops; see node/metering/clocks.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from node.metering.clocks import Clocks
from node.metering.meters import HopMeter, StageMeter
from unicluster.v1.stage_pb2 import StageReport


@dataclass(frozen=True, slots=True)
class Trip:
    """Round trip of one frame; `sent_s` and `returned_s` by the head's clock.

    `single`: it carried one token of one answer; `drafted`: so many more of it, else 0.
    `returned_bytes` of hidden state came back, `handed_s` seconds after they were computed.
    """

    sent_s: float
    returned_s: float
    returned_bytes: int
    single: bool
    reports: Sequence[StageReport]
    drafted: int = 0
    handed_s: float = 0.0

    def differences(self) -> list[float]:
        """Seconds for each hop, arrival less departure, each by its machine's clock."""
        left = self.sent_s
        differences = []
        for report in self.reports:
            differences.append(report.arrived_s - left)
            left = report.arrived_s + report.queue_s + report.compute_s
        return [*differences, self.returned_s - left]

    def handed(self) -> list[float]:
        """Seconds of each hop that its sender's event loop took to begin with it.

        Zeros where they can't be true: all hops together are known, whatever the clocks say.
        """
        said = [*(report.handed_s for report in self.reports), self.handed_s]
        possible = min(said) >= 0 and sum(said) <= sum(self.differences())
        return said if possible else [0.0] * len(said)

    def carried(self) -> list[int]:
        """Bytes of hidden state for each hop."""
        return [*(report.received_bytes for report in self.reports), self.returned_bytes]


class Trips:
    """Meters of the remote stages, by index from 1, and of the hops. For the event loop.

    `machines` are their names, the head's first.
    """

    def __init__(self, machines: Sequence[str]) -> None:
        self.machines = tuple(machines)
        self.clocks = Clocks(len(machines))
        self.head = StageMeter()
        self.stages = [StageMeter() for _ in machines[1:]]
        self.hops = [HopMeter() for _ in machines]

    def note(self, trip: Trip) -> None:
        """Counts a frame that came back."""
        for meter, report in zip(self.stages, trip.reports, strict=True):
            meter.frames += 1
            meter.busy_s += report.compute_s
            meter.queue_s += report.queue_s
            meter.disk_bytes = report.disk_bytes
            meter.threads = report.threads
            meter.skipped += report.skipped
            if trip.single and not report.skipped:
                meter.decode.note(report.compute_s)
            elif trip.drafted and not report.skipped:
                meter.note_drafted(trip.drafted, report.compute_s)
        self.head.frames += 1
        taken = self.clocks.hops(trip.differences(), trip.returned_s)
        for hop, seconds, carried in zip(self.hops, taken, trip.carried(), strict=True):
            hop.frames += 1
            hop.bytes += carried
            hop.seconds += seconds
            if trip.single:
                hop.decode.note(seconds)
