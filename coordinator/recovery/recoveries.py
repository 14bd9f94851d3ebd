"""Recoveries of answers, counted, with the times of their parts."""

from dataclasses import dataclass

from unicluster.v1.chat_pb2 import Recoveries


@dataclass
class Gap:
    """A gap in an answer, by one clock in seconds.

    heard: the last event before. broke: when it was known. planned, loaded: when the stages by
    which it goes on were planned and the model answered again, if either was. Plans that came to
    nothing, and loads of stages that failed, are before `planned`.
    """

    heard: float
    broke: float
    planned: float = 0.0
    loaded: float = 0.0

    def parts(self, now: float) -> dict[str, float]:
        """Seconds of each part of a gap that ends now. Together they are the gap."""
        planned = min(max(self.planned, self.broke), now)
        loaded = min(max(self.loaded, planned), now)
        return {
            "detect": self.broke - self.heard,
            "plan": planned - self.broke,
            "load": loaded - planned,
            "replay": now - loaded,
        }


class RecoveryMeter:
    """Counts since this process started: gaps of answers, not losses of machines."""

    def __init__(self) -> None:
        self._counts = Recoveries()

    def resumed(self, gap: Gap, now: float, replayed: int, cached: int) -> None:
        """An answer goes on after a gap.

        `replayed` of its tokens were computed again, each by all stages, `cached` were in caches.
        """
        counts = self._counts
        counts.resumed += 1
        counts.replayed_tokens += replayed
        counts.cached_tokens += cached
        parts = gap.parts(now)
        counts.detect_s += parts["detect"]
        counts.plan_s += parts["plan"]
        counts.load_s += parts["load"]
        counts.replay_s += parts["replay"]

    def returned(self, replayed: int, cached: int) -> None:
        """An answer goes on for a client that came back with it; tokens as of `resumed`."""
        self._counts.returned += 1
        self._counts.replayed_tokens += replayed
        self._counts.cached_tokens += cached

    def failed(self) -> None:
        """An answer ends in its gap."""
        self._counts.failed += 1

    def to_wire(self) -> Recoveries:
        copy = Recoveries()
        copy.CopyFrom(self._counts)
        return copy
