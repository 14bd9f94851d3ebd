"""Metrics of a deployment, and the rates that follow from two readings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from unicluster.client.answers import ChatInfo, info_from_wire
from unicluster.v1 import chat_pb2, meters_pb2


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations: `counts[i]` of at most `bounds[i]` seconds, the last of those above all."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean duration in seconds; 0 if there are none."""
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class StageMetrics:
    """One machine's work in the ring, since it was opened.

    `decode_s` is what one token of one answer took here, the median of the last ones; 0: none.
    `busy` is the share of the time in which it worked, `waiting` how many frames waited for it on
    average: see Metrics.since. `disk_bytes` of prompt caches are on its disk. `skipped`: frames
    that were cancelled before they were begun here. `threads` compute a token; 0: the engine
    doesn't say.
    """

    machine: str
    frames: int
    busy_s: float
    queue_s: float
    decode_s: float
    busy: float = 0.0
    waiting: float = 0.0
    disk_bytes: int = 0
    skipped: int = 0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class HopMetrics:
    """A hop from one machine to the next: `seconds` and `bytes` (of hidden state) of all frames.

    `decode_s` is what one token of one answer took, the median of the last ones; 0: none.
    """

    source: str
    target: str
    frames: int
    seconds: float
    bytes: int
    decode_s: float


@dataclass(frozen=True, slots=True)
class Recoveries:
    """Gaps of answers since the server started: those that went on, and those that did not.

    Seconds are sums over the former: since the last token until the loss was known, until other
    stages were chosen, until the model answered again, and until the next token. `returned`:
    answers whose clients came back with them. Of the tokens of prompts and answers that went on,
    `replayed_tokens` were computed again, each by all stages, and `cached_tokens` were in caches.
    """

    resumed: int = 0
    failed: int = 0
    returned: int = 0
    replayed_tokens: int = 0
    cached_tokens: int = 0
    detect_s: float = 0.0
    plan_s: float = 0.0
    load_s: float = 0.0
    replay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """How tokens are guessed: by `mode` (auto, lookup, model; empty: not at all).

    depth: frames of one answer on their way; 0: several guesses in one trip. width: tokens in the
    latest. plain_s, guessing_s: for a token of a lone answer, without guesses and on average with
    them; 0 until known.
    """

    mode: str = ""
    depth: int = 0
    width: int = 0
    plain_s: float = 0.0
    guessing_s: float = 0.0

    @property
    def gain(self) -> float:
        """Tokens a second with guesses, in times of those without; 0 until known."""
        return self.plain_s / self.guessing_s if self.guessing_s else 0.0


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters since the head's process started, `now_s` by its clock, and how it is now.

    `stages` and `hops` are empty while no head answers. `ended` counts requests by how they
    ended: stop, length, cancelled, failed. Of the memory for KV caches, `cache_bytes`,
    caches of finished answers have `cached_bytes`, and running ones may grow to `reserved_bytes`.
    `tokens_per_s` is over all answers: see `since`. Of `disk_hits` prompts the beginning came from
    the machines' disks, `disk_tokens` together; each disk has at most `disk_limit_bytes`, 0: none.
    """

    info: ChatInfo
    now_s: float = 0.0
    stages: tuple[StageMetrics, ...] = ()
    hops: tuple[HopMetrics, ...] = ()
    time_to_first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    ended: dict[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculation: Speculation = field(default_factory=Speculation)
    running: int = 0
    waiting: int = 0
    cached_bytes: int = 0
    reserved_bytes: int = 0
    cache_bytes: int = 0
    disk_hits: int = 0
    disk_tokens: int = 0
    disk_limit_bytes: int = 0
    tokens_per_s: float = 0.0
    recoveries: Recoveries = field(default_factory=Recoveries)
    losses: dict[str, int] = field(default_factory=dict)  # of workers and machines, by cause

    def since(self, before: "Metrics") -> "Metrics":
        """This reading with rates and shares of the time since an earlier one.

        They stay 0 if the head was started anew in between.
        """
        seconds = self.now_s - before.now_s
        tokens = self.generated_tokens - before.generated_tokens
        if seconds <= 0 or tokens < 0:
            return self
        stages = self.stages
        if [s.machine for s in stages] == [s.machine for s in before.stages]:
            pairs = zip(stages, before.stages, strict=True)
            stages = tuple(_since(now, old, seconds) for now, old in pairs)
        return replace(self, stages=stages, tokens_per_s=tokens / seconds)


def _since(now: StageMetrics, old: StageMetrics, seconds: float) -> StageMetrics:
    # Work is counted when it is done, and may have begun before the first reading.
    busy = min(max(now.busy_s - old.busy_s, 0.0) / seconds, 1.0)
    return replace(now, busy=busy, waiting=max(now.queue_s - old.queue_s, 0.0) / seconds)


def metrics_from_wire(measured: chat_pb2.Measured) -> Metrics:
    info, meters = info_from_wire(measured.info), measured.meters
    gaps = measured.recoveries
    machines = [stage.machine for stage in meters.stages]
    return Metrics(
        info=info,
        now_s=meters.now_s,
        stages=tuple(
            StageMetrics(
                machine=stage.machine,
                frames=stage.frames,
                busy_s=stage.busy_s,
                queue_s=stage.queue_s,
                decode_s=stage.decode_s,
                disk_bytes=stage.disk_bytes,
                skipped=stage.skipped,
                threads=stage.threads,
            )
            for stage in meters.stages
        ),
        hops=_hops(meters.hops, machines),
        time_to_first_token=_histogram(meters.time_to_first_token),
        between_tokens=_histogram(meters.between_tokens),
        ended=dict(meters.ended),
        generated_tokens=meters.generated_tokens,
        prompt_tokens=meters.prompt_tokens,
        reused_tokens=meters.reused_tokens,
        drafted_tokens=meters.drafted_tokens,
        accepted_tokens=meters.accepted_tokens,
        speculation=Speculation(
            mode=meters.speculation.mode,
            depth=meters.speculation.depth,
            width=meters.speculation.width,
            plain_s=meters.speculation.plain_s,
            guessing_s=meters.speculation.guessing_s,
        ),
        running=meters.running,
        waiting=meters.waiting,
        cached_bytes=meters.kept_bytes,
        reserved_bytes=meters.promised_bytes,
        cache_bytes=meters.cache_bytes,
        losses=dict(measured.losses),
        recoveries=Recoveries(
            resumed=gaps.resumed,
            failed=gaps.failed,
            returned=gaps.returned,
            replayed_tokens=gaps.replayed_tokens,
            cached_tokens=gaps.cached_tokens,
            detect_s=gaps.detect_s,
            plan_s=gaps.plan_s,
            load_s=gaps.load_s,
            replay_s=gaps.replay_s,
        ),
        disk_hits=meters.disk_hits,
        disk_tokens=meters.disk_tokens,
        disk_limit_bytes=meters.disk_limit_bytes,
    )


def _hops(hops: Sequence[meters_pb2.HopMeter], machines: Sequence[str]) -> tuple[HopMetrics, ...]:
    ring = [*machines, *machines[:1]]
    return tuple(
        HopMetrics(source, target, hop.frames, hop.seconds, hop.bytes, hop.decode_s)
        for hop, source, target in zip(hops, ring, ring[1:], strict=False)
    )


def _histogram(histogram: meters_pb2.Histogram) -> Histogram:
    return Histogram(tuple(histogram.bounds), tuple(histogram.counts), histogram.sum)
