"""How tokens are guessed now, for people."""

from collections.abc import Sequence

from node.speculation.drafting import Speculation
from node.speculation.pace import Pace
from unicluster.v1 import meters_pb2 as wire


def speculation_meter(speculation: Speculation, paces: Sequence[Pace]) -> wire.Speculation:
    """Mode, and what the lane has measured that has guessed most; `paces`: of those that pipe."""
    meter = wire.Speculation(mode=speculation.mode)
    if paces:
        busiest = max(paces, key=lambda pace: pace.tokens)
        meter.depth, meter.width = busiest.depth, busiest.latest_width
        meter.plain_s, meter.guessing_s = busiest.plain_s, busiest.guessing_s
    return meter
