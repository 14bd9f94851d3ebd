"""The tables of `unicluster status`: a deployment, its stages and its metrics."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from coordinator.planning.engines import DEFAULT
from coordinator.terminal.tables import (
    FREE,
    WEIGHTS,
    Bar,
    add_bar,
    add_names,
    add_numbers,
    add_words,
    fitting,
    layer_range,
    new_table,
    whole,
)
from unicluster.client.metrics import Metrics, Speculation
from unicluster.units import counted, format_bytes, format_ms

_STATES = {"ready": "green", "failed": "bold red"}


def status_table(metrics: Metrics, address: str) -> RenderableType:
    """The deployment at `address`: its state, how busy its machines are, and its totals."""
    return _Status(metrics, address)


@dataclass(frozen=True)
class _Status:
    metrics: Metrics
    address: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        info = self.metrics.info
        title = Text(f"{info.model} {info.quant}".strip(), "bold")
        title.append(f" at {self.address}: ", "not bold").append(
            info.state, _STATES.get(info.state)
        )
        yield title
        if info.detail:
            style = "red" if info.state == "failed" else "yellow"
            yield Text(f"{info.cause}: {info.detail}" if info.cause else info.detail, style)
        if info.stages:
            shapes = [(True, 16), (False, 16), (False, 8), (False, 0)]
            yield fitting(console, options, (self._stages(*shape) for shape in shapes))
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column()
        for name, value in self._facts():
            facts.add_row(name, Text(value))
        yield facts

    def _stages(self, wide: bool, bar: int) -> Table:
        """The ring's machines; figures only while their head answers. bar: columns of bars."""
        metrics = self.metrics
        table = new_table("")
        engines = any(stage.engine != DEFAULT for stage in metrics.info.stages)
        add_names(table, "machine")
        add_words(table, *["engine"] * engines)
        add_numbers(table, "layers")
        add_bar(table, bar)
        threads = any(meter.threads for meter in metrics.stages)
        add_numbers(
            table,
            *["threads"] * threads,
            "busy",
            "waiting",
            "ms/token",
            "hop ms",
            *["sent", "frames"] * wide,
        )
        by_stage = dict(enumerate(zip(metrics.stages, metrics.hops or [None], strict=False)))
        for index, stage in enumerate(metrics.info.stages):
            named: list[RenderableType] = [
                whole(stage.node),
                *[stage.engine] * engines,
                layer_range(stage.first_layer, stage.end_layer),
            ]
            if index not in by_stage:
                table.add_row(*named)
                continue
            meter, hop = by_stage[index]
            busy = round(meter.busy * 1000)
            table.add_row(
                *named,
                *[Bar([(busy, WEIGHTS), (1000 - busy, FREE)], bar)] * bool(bar),
                *[str(meter.threads or "")] * threads,
                f"{meter.busy * 100:.0f} %",
                f"{meter.waiting:.2f}",
                format_ms(meter.decode_s) if meter.decode_s else "",
                format_ms(hop.decode_s) if hop is not None and hop.decode_s else "",
                *[format_bytes(hop.bytes) if hop is not None else "", str(meter.frames)] * wide,
            )
        return table

    def _facts(self) -> Iterator[tuple[str, str]]:
        metrics, info = self.metrics, self.metrics.info
        lanes = f", {counted(info.lanes, 'lane')}" if info.lanes else ""
        yield "serves", f"context {info.context}, {counted(info.users, 'user')}{lanes}"
        workers = [f"{each.node} at {each.address}" for each in info.stages if each.address]
        if workers:
            yield "workers", ", ".join(workers)
        if not metrics.stages:
            return
        now = f"{metrics.tokens_per_s:.1f} tokens/s now, {metrics.generated_tokens} in total"
        yield "tokens", now
        ended = [f"{count} {_ENDED[how]}" for how, count in sorted(metrics.ended.items()) if count]
        requests = [f"{metrics.running} running", f"{metrics.waiting} waiting", *ended]
        yield "requests", ", ".join(requests)
        if metrics.time_to_first_token.count:
            ttft = f"TTFT {metrics.time_to_first_token.mean:.2f} s"
            yield "on average", f"{ttft}, {format_ms(metrics.between_tokens.mean)} ms per token"
        if metrics.prompt_tokens:
            reused = f"{metrics.reused_tokens} of them from the prefix cache"
            yield "prompts", f"{metrics.prompt_tokens} tokens, {reused}"
        if metrics.speculation.mode:
            yield "speculation", _speculation(metrics.speculation)
        if metrics.drafted_tokens:
            share = metrics.accepted_tokens / metrics.drafted_tokens
            yield "drafted", f"{metrics.drafted_tokens} tokens, {share * 100:.0f} % accepted"
        if metrics.cache_bytes:
            cached = format_bytes(metrics.cached_bytes)
            reserved = format_bytes(metrics.reserved_bytes)
            total = format_bytes(metrics.cache_bytes)
            yield "KV cache", f"{reserved} reserved for answers, {cached} cached, of {total}"
        if metrics.disk_limit_bytes:
            used = ", ".join(f"{s.machine} {format_bytes(s.disk_bytes)}" for s in metrics.stages)
            limit = format_bytes(metrics.disk_limit_bytes)
            hits = f"{counted(metrics.disk_hits, 'hit')}, {metrics.disk_tokens} tokens"
            yield "on disk", f"{used}, of {limit} each; {hits}"


def _speculation(how: Speculation) -> str:
    said = how.mode
    if how.depth:
        said += f", {counted(how.depth, 'frame')} in flight"
        said += f" of {how.width} tokens" if how.width > 1 else ""
    return said + (f", {how.gain:.2f} x plain decode" if how.gain else "")


_ENDED = {
    "stop": "completed",
    "length": "stopped at the token limit",
    "cancelled": "cancelled",
    "failed": "failed",
}
