"""A deployment's metrics for Prometheus: names, types and labels."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from unicluster.causes import Cause
from unicluster.client.metrics import Histogram, HopMetrics, Metrics, Recoveries, StageMetrics

STATES = ("loading", "ready", "recovering", "failed")
STAGE = ("stage", "machine")
HOP = ("source", "target")


class DeploymentCollector(Collector):
    """Reads with `read` whenever it is scraped."""

    def __init__(self, read: Callable[[], Metrics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        metrics = self._read()
        yield from _served(metrics)
        yield from _recoveries(metrics.recoveries)
        yield _losses(metrics.losses)
        if metrics.stages:  # else there is no head, and nothing that counts
            yield from _answers(metrics)
            yield from _stages(metrics.stages)
            yield from _hops(metrics.hops)


def _served(metrics: Metrics) -> Iterator[Metric]:
    info = metrics.info
    about = InfoMetricFamily("unicluster_deployment", "Model that is served.")
    about.add_metric((), {"model": info.model, "quant": info.quant})
    yield about
    state = GaugeMetricFamily(
        "unicluster_deployment_state", "1 for the current state.", labels=("state",)
    )
    for name in STATES:
        state.add_metric((name,), float(info.state == name))
    yield state
    yield _gauge("unicluster_context_tokens", "Prompt and answer together.", info.context)
    yield _gauge("unicluster_users", "Answers that run at the same time at most.", info.users)
    layers = GaugeMetricFamily("unicluster_stage_layers", "Layers of the stage.", labels=STAGE)
    weights = GaugeMetricFamily(
        "unicluster_stage_weight_bytes", "Weights of the stage.", labels=STAGE
    )
    for index, stage in enumerate(info.stages):
        layers.add_metric((str(index), stage.node), stage.end_layer - stage.first_layer)
        weights.add_metric((str(index), stage.node), stage.weight_bytes)
    yield layers
    yield weights


def _recoveries(recoveries: Recoveries) -> Iterator[Metric]:
    gaps = CounterMetricFamily(
        "unicluster_recoveries",
        "Answers that a lost machine broke off, and that went on or did not.",
        labels=("outcome",),
    )
    gaps.add_metric(("resumed",), recoveries.resumed)
    gaps.add_metric(("failed",), recoveries.failed)
    gaps.add_metric(("returned",), recoveries.returned)
    yield gaps
    seconds = CounterMetricFamily(
        "unicluster_recovery_seconds",
        "Time that answers stood still until they went on, by what for.",
        labels=("part",),
    )
    for part in ("detect", "plan", "load", "replay"):
        seconds.add_metric((part,), getattr(recoveries, f"{part}_s"))
    yield seconds
    yield CounterMetricFamily(
        "unicluster_replayed_tokens",
        "Tokens of prompts and answers computed again for answers that went on.",
        value=recoveries.replayed_tokens,
    )
    yield CounterMetricFamily(
        "unicluster_recovered_cache_tokens",
        "Tokens of prompts and answers that went on that caches still had.",
        value=recoveries.cached_tokens,
    )


def _losses(losses: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(
        "unicluster_losses", "Workers and machines that were lost, by cause.", labels=("cause",)
    )
    for cause in Cause:
        family.add_metric((cause,), losses.get(cause, 0))
    return family


def _answers(metrics: Metrics) -> Iterator[Metric]:
    yield _gauge("unicluster_lanes", "Batches that take turns.", metrics.info.lanes)
    yield _gauge("unicluster_requests_running", "Requests that are answered.", metrics.running)
    yield _gauge("unicluster_requests_waiting", "Requests in the queue.", metrics.waiting)
    ended = CounterMetricFamily(
        "unicluster_requests", "Requests that have ended, by how.", labels=("outcome",)
    )
    for outcome, count in sorted(metrics.ended.items()):
        ended.add_metric((outcome,), count)
    yield ended
    for name, meaning, value in (
        ("generated_tokens", "Tokens of answers.", metrics.generated_tokens),
        ("prompt_tokens", "Tokens of prompts.", metrics.prompt_tokens),
        (
            "prompt_tokens_reused",
            "Prompt tokens from the prefix cache.",
            metrics.reused_tokens,
        ),
        ("disk_hits", "Prompts whose beginning came from disk.", metrics.disk_hits),
        ("prompt_tokens_from_disk", "Prompt tokens reused from disk.", metrics.disk_tokens),
        ("drafted_tokens", "Tokens drafted.", metrics.drafted_tokens),
        ("accepted_tokens", "Drafted tokens that were accepted.", metrics.accepted_tokens),
    ):
        yield CounterMetricFamily(f"unicluster_{name}", meaning, value=value)
    guessing = metrics.speculation
    if guessing.mode:
        mode = GaugeMetricFamily(
            "unicluster_speculation", "How tokens are guessed, by mode.", labels=("mode",)
        )
        mode.add_metric((guessing.mode,), 1)
        yield mode
        yield _gauge(
            "unicluster_speculation_depth", "Frames in flight of one answer.", guessing.depth
        )
        yield _gauge(
            "unicluster_speculation_gain",
            "Tokens a second of a lone answer with guesses, in times of those without.",
            guessing.gain,
        )
    yield _histogram(
        "unicluster_time_to_first_token_seconds",
        "From a request's arrival to its first token.",
        metrics.time_to_first_token,
    )
    yield _histogram(
        "unicluster_inter_token_seconds",
        "Between two tokens of an answer.",
        metrics.between_tokens,
    )
    cache = GaugeMetricFamily(
        "unicluster_cache_bytes",
        "KV caches on all machines: cached for reuse (kept), reserved for answers (promised).",
        labels=("use",),
    )
    cache.add_metric(("kept",), metrics.cached_bytes)
    cache.add_metric(("promised",), metrics.reserved_bytes)
    yield cache
    yield _gauge(
        "unicluster_cache_limit_bytes",
        "Memory for KV caches, all machines.",
        metrics.cache_bytes,
    )
    yield _gauge(
        "unicluster_disk_limit_bytes",
        "Disk for prompt caches, each machine.",
        metrics.disk_limit_bytes,
    )


def _stages(stages: tuple[StageMetrics, ...]) -> Iterator[Metric]:
    frames = CounterMetricFamily("unicluster_stage_frames", "Frames served.", labels=STAGE)
    busy = CounterMetricFamily(
        "unicluster_stage_busy_seconds", "Time spent computing.", labels=STAGE
    )
    queue = CounterMetricFamily(
        "unicluster_stage_queue_seconds", "Time that frames have waited.", labels=STAGE
    )
    skipped = CounterMetricFamily(
        "unicluster_stage_skipped_frames",
        "Frames of wrong guesses, cancelled before they were begun.",
        labels=STAGE,
    )
    decode = GaugeMetricFamily(
        "unicluster_stage_decode_seconds",
        "Time to decode one token of one answer: the median of recent ones.",
        labels=STAGE,
    )
    disk = GaugeMetricFamily(
        "unicluster_stage_disk_bytes", "Prompt caches on the machine's disk.", labels=STAGE
    )
    threads = GaugeMetricFamily(
        "unicluster_stage_threads", "Threads that compute a token, where known.", labels=STAGE
    )
    for index, stage in enumerate(stages):
        labels = str(index), stage.machine
        if stage.threads:
            threads.add_metric(labels, stage.threads)
        disk.add_metric(labels, stage.disk_bytes)
        frames.add_metric(labels, stage.frames)
        busy.add_metric(labels, stage.busy_s)
        queue.add_metric(labels, stage.queue_s)
        skipped.add_metric(labels, stage.skipped)
        if stage.decode_s:
            decode.add_metric(labels, stage.decode_s)
    yield from (frames, busy, queue, skipped, decode, disk, threads)


def _hops(hops: tuple[HopMetrics, ...]) -> Iterator[Metric]:
    taken = SummaryMetricFamily(
        "unicluster_hop_seconds", "Frames on their way to the next machine.", labels=HOP
    )
    carried = CounterMetricFamily(
        "unicluster_hop_bytes", "Hidden state that frames carried.", labels=HOP
    )
    decode = GaugeMetricFamily(
        "unicluster_hop_decode_seconds",
        "Time of the hop for one token of one answer: the median of recent ones.",
        labels=HOP,
    )
    for hop in hops:
        taken.add_metric((hop.source, hop.target), hop.frames, hop.seconds)
        carried.add_metric((hop.source, hop.target), hop.bytes)
        if hop.decode_s:
            decode.add_metric((hop.source, hop.target), hop.decode_s)
    yield from (taken, carried, decode)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def _histogram(name: str, meaning: str, histogram: Histogram) -> Metric:
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    below = accumulate(histogram.counts)
    buckets = [(bound, float(count)) for bound, count in zip(bounds, below, strict=True)]
    return HistogramMetricFamily(name, meaning, buckets=buckets, sum_value=histogram.sum)
