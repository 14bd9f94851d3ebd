"""The clocks of a ring's machines, and with them how long each hop takes.

Clocks of machines are not synchronized, and a one-way latency can't be measured with one clock.
Two things are known of the other clocks:

- Each is asked now and then, as NTP does: what it says belongs to the middle of the question's
  round trip, and is wrong by half of it at most.
- No frame arrives before it has left. For each hop the least difference between arrival and
  departure, each by its own machine's clock, is the offset between the two clocks plus the
  fastest hop. Round the ring the offsets cancel out, so the sum of the fastest hops is known
  exactly, and the answers of the clocks only say how it is shared among them. Where one of them
  was not heard, all hops are taken to be equally fast.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence

import grpc

from unicluster.cluster.background import going_on
from unicluster.dialing.dialer import Dialer
from unicluster.errors import UniclusterError
from unicluster.trust.identity import Credentials
from unicluster.v1.stage_pb2 import ClockRequest, RouteStop
from unicluster.v1.stage_pb2_grpc import StageStub

log = logging.getLogger(__name__)

ASK_SECONDS = 5.0
QUESTIONS = 5
# Least differences are those of the last one or two of these.
WINDOW_SECONDS = 1.0
# Quartz clocks drift apart by less, in seconds a second.
DRIFT = 50e-6


class Clocks:
    """Offsets of `machines` clocks, the head's being the first: frames go round them in order.

    For one thread, the event loop's.
    """

    def __init__(self, machines: int) -> None:
        # By machine: offset to the head's clock, how wrong it may be, when it was asked.
        self._readings: list[tuple[float, float, float] | None] = [(0.0, 0.0, math.inf)]
        self._readings += [None] * (machines - 1)
        self._least = self._least_before = [math.inf] * machines
        self._shifts: list[float] | None = None
        self._since = -math.inf

    @property
    def offsets(self) -> list[float | None]:
        """Offsets in seconds of each clock to the head's; None before the first reading."""
        return [reading[0] if reading is not None else None for reading in self._readings]

    def record(self, machine: int, asked: float, said: float, heard: float) -> None:
        """Records a reading `said` of a clock, taken between `asked` and `heard` of the head's."""
        error = (heard - asked) / 2
        old = self._readings[machine]
        if old is None or error <= old[1] + DRIFT * (heard - old[2]):
            self._readings[machine] = (said - (asked + heard) / 2, error, heard)

    def hops(self, differences: Sequence[float], now: float) -> list[float]:
        """The seconds of each hop of one trip.

        `differences`: arrival less departure, each by the clock of its machine.
        """
        age = now - self._since
        if age > WINDOW_SECONDS:  # old minima are no longer valid: clocks drift
            unknown = [math.inf] * len(differences)
            self._least_before = self._least if age < 2 * WINDOW_SECONDS else unknown
            self._least, self._since, self._shifts = unknown, now, None
        if self._shifts is None or any(map(float.__lt__, differences, self._least)):
            self._least = [min(pair) for pair in zip(self._least, differences, strict=True)]
            known = [min(p) for p in zip(self._least, self._least_before, strict=True)]
            self._shifts = shifts(known, self.offsets)
        return [
            max(difference - shift, 0.0)
            for difference, shift in zip(differences, self._shifts, strict=True)
        ]


def shifts(least: Sequence[float], offsets: Sequence[float | None]) -> list[float]:
    """Seconds for each hop by which the clock at its end is ahead of the one at its beginning.

    `least`: the least difference of each hop; `offsets` of the clocks, None where not known. The
    result makes no hop negative and adds up to 0.
    """
    total = max(sum(least), 0.0)
    even = total / len(least)
    known = [0.0 if offset is None else offset for offset in offsets]
    ahead = [*known[1:], known[0]]
    fastest = [max(d - (b - a), 0.0) for d, a, b in zip(least, known, ahead, strict=True)]
    if None in offsets or not sum(fastest):
        fastest = [even] * len(least)
    else:
        scale = total / sum(fastest)
        fastest = [hop * scale for hop in fastest]
    return [difference - hop for difference, hop in zip(least, fastest, strict=True)]


async def follow(clocks: Clocks, route: Sequence[RouteStop], identity: Credentials) -> None:
    """Asks the clock of each machine of a ring, until cancelled."""
    dialer = Dialer(identity)
    channels: dict[int, grpc.aio.Channel] = {}
    try:
        while True:
            for machine, stop in enumerate(route, start=1):
                with going_on(f"asking the clock of machine {stop.node}"):
                    try:
                        if machine not in channels:
                            channels[machine], _ = await dialer.connect_stop(stop)
                        await _ask(clocks, machine, channels[machine])
                    # The ring tells if the machine is gone.
                    except grpc.aio.AioRpcError as error:
                        log.info("clock of machine %s: %s", stop.node, error.details())
                        # The next one has a certificate that is current.
                        await channels.pop(machine).close(None)
                    except UniclusterError as error:
                        log.info("clock of machine %s: %s", stop.node, error)
            await asyncio.sleep(ASK_SECONDS)
    finally:
        for channel in channels.values():
            await channel.close(None)


async def _ask(clocks: Clocks, machine: int, channel: grpc.aio.Channel) -> None:
    for _ in range(QUESTIONS):
        asked = time.perf_counter()
        reading = await StageStub(channel).Clock(ClockRequest(), timeout=ASK_SECONDS)
        clocks.record(machine, asked, reading.now_s, time.perf_counter())
