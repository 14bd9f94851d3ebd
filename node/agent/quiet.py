"""Measuring the memory's bandwidth again when the machine is quiet.

At its start an agent measures whatever else is going on: other programs, or other agents that
start at the same moment, take their part of the bandwidth.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from random import SystemRandom

from node.agent.probe import Hardware, measure_bandwidth
from unicluster.units import format_rate

log = logging.getLogger(__name__)

# Percent of all cores that a quiet machine uses at most.
QUIET_PERCENT = 15.0
AGAIN_SECONDS = 1800.0
# Agents that start together on one host don't measure together.
SPREAD_SECONDS = 20.0
# A smaller change of the bandwidth gains less than it costs: it moves layers, which are fetched.
NOTICEABLE = 0.1


@dataclass
class QuietMeasuring:
    """Says when to measure, and measures."""

    measure: Callable[[int], float] = measure_bandwidth
    spread: float = field(default_factory=lambda: SystemRandom().uniform(0.0, SPREAD_SECONDS))
    _due: float | None = None

    def due(self, hardware: Hardware, now: float, busy_percent: float, *, stages: bool) -> bool:
        """Whether to measure now, in seconds of any clock; a stage that is loaded may compute."""
        if not any(device.bandwidth_measured for device in hardware.found):
            return False
        if self._due is None:
            self._due = now + self.spread
        if now < self._due or stages or busy_percent > QUIET_PERCENT:
            return False
        self._due = now + AGAIN_SECONDS + self.spread
        return True

    def measured(self, hardware: Hardware) -> Hardware:
        """The machine with the bandwidth that it has now. Takes a fraction of a second."""
        bandwidth = self.measure(hardware.memories.host.free())
        before = next(d.bandwidth for d in hardware.found if d.bandwidth_measured)
        if abs(bandwidth - before) <= NOTICEABLE * before:
            return hardware
        rates = f"{format_rate(bandwidth)}, before {format_rate(before)}"
        log.info("memory bandwidth measured while the machine is quiet: %s", rates)
        return hardware.with_measured(bandwidth)
