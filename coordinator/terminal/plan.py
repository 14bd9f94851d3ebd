"""The fleet, a plan, and what it is compared with, as people see them in the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from coordinator.fleet.measured import TokenTimes
from coordinator.planning.engines import DEFAULT, ENGINES
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout, Plan, Stage
from coordinator.planning.rivals import Rival
from coordinator.planning.variants import ModelVariants
from coordinator.terminal.devices import devices_table, share_lines, usable_cell
from coordinator.terminal.disk_line import disk_line
from coordinator.terminal.engine_lines import engine_lines, listed
from coordinator.terminal.reuse_lines import reuse_lines
from coordinator.terminal.tables import (
    FREE,
    KV,
    RESERVE,
    WEIGHTS,
    Bar,
    Ink,
    add_bar,
    add_names,
    add_numbers,
    add_words,
    fitting,
    layer_range,
    new_table,
    stacked,
    who,
    whole,
)
from unicluster.units import counted, format_bytes, format_ms, format_rate
from unicluster.v1 import node_pb2

MEMORY = "memory"
# Of tables of machines, the widest first: whether the chip has a column, and whether lists are
# stacked and the address is under the name.
SHAPES = ((True, False), (False, False), (False, True))
# Columns that a reason has at least.
WORDS = 20


class _Legend:
    """Legend of the bars' glyphs."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text(no_wrap=True)
        for ink in (WEIGHTS, KV, RESERVE, FREE):
            text.append(ink.ascii if options.ascii_only else ink.glyph, ink.style)
            text.append(f" {ink.name}   ")
        yield text


def fleet_table(machines: Sequence[Machine], title: str = "Machines") -> RenderableType:
    """The machines that a plan may use, the roomiest first."""
    return _Fleet(machines, title)


def nodes_table(nodes: Iterable[tuple[node_pb2.NodeInfo, str]]) -> RenderableType:
    """The machines of the cluster: descriptions and addresses."""
    return _Nodes(tuple(nodes))


def plan_table(plan: Plan, model: Layout | ModelVariants, title: str) -> RenderableType:
    """Layers by machine, predicted speed, bottleneck, and the machines left out."""
    return _Planned(
        plan, model if isinstance(model, ModelVariants) else ModelVariants(model), title
    )


def rivals_table(others: Sequence[Rival]) -> RenderableType:
    """Plans that lost, and why."""
    table = new_table("Other plans")
    add_names(table, "machines and layers")
    add_numbers(table, "ms/token", "tokens/s")
    table.add_column("why not", min_width=WORDS)
    for other in others:
        spans = [f"{s.machine.name} {layer_range(s.first, s.end)}" for s in other.plan.stages]
        shown = spans[:3] + ([f"and {len(spans) - 3} more"] if len(spans) > 3 else [])
        seconds = other.plan.seconds_per_token
        table.add_row(
            whole("\n".join(shown)), format_ms(seconds), f"{1 / seconds:.3g}", Text(other.reason)
        )
    return table


def comparison_table(model: str, stages: Sequence[Stage], measured: TokenTimes) -> RenderableType:
    """Predicted and measured times of a token, by stage and hop."""
    table = new_table(f"{model}: predicted and measured, ms per token")
    add_names(table, "")
    add_numbers(table, "layers", "predicted", "measured", "error")
    for stage, seconds in zip(stages, measured.stages, strict=True):
        layers = layer_range(stage.first, stage.end)
        table.add_row(
            whole(stage.machine.name), layers, *_compared(stage.seconds_per_token, seconds)
        )
    hops = sum(stage.hop_s for stage in stages)
    hops_measured = hops if measured.hops is None else sum(measured.hops)
    if measured.hops is not None:
        table.add_row(counted(len(stages), "hop"), "", *_compared(hops, hops_measured))
    elif hops:
        table.add_row(counted(len(stages), "hop"), "", format_ms(hops), "unknown")
    predicted = hops + sum(stage.seconds_per_token for stage in stages)
    together = _compared(predicted, hops_measured + sum(measured.stages))
    table.add_row(Text("together", "bold"), "", *together)
    return table


def _compared(predicted: float, measured: float) -> tuple[str, str, str]:
    return format_ms(predicted), format_ms(measured), f"{(predicted / measured - 1) * 100:+.0f} %"


@dataclass(frozen=True)
class _Fleet:
    machines: Sequence[Machine]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fitting(console, options, (self._table(*shape) for shape in SHAPES))
        yield _sum_up(len(self.machines), sum(m.usable for m in self.machines))

    def _table(self, wide: bool, stack: bool) -> Table:
        there = any(m.address for m in self.machines)
        beside = there and not stack
        shown = stacked if stack else str
        table = new_table(self.title)
        add_names(table, "machine", *["chip"] * wide)
        add_words(table, *["backend"] * there)
        add_numbers(table, "usable", "bandwidth")
        add_words(table, *["address"] * beside)
        for m in sorted(self.machines, key=lambda m: (-m.usable, m.name)):
            table.add_row(
                *who(m.name, m.chip, wide, *[m.address] * (there and stack)),
                *[Text(shown(_backends(m)))] * there,
                usable_cell(m),
                shown(_bandwidths(m)),
                *[Text(m.address)] * beside,
            )
        return table


def _installed(info: node_pb2.NodeInfo) -> str:
    machine = Machine.from_proto(info, "")
    return _backends(machine) if machine.engines else f"no {ENGINES[DEFAULT].library}"


def _bandwidths(machine: Machine) -> str:
    """The rate of the preferred engine, and those of others where they differ from it."""
    rates = {engine: format_rate(speeds.bandwidth) for engine, speeds in machine.engines.items()}
    first = next(iter(rates.values()), "")
    others = [f"{engine} {rate}" for engine, rate in rates.items() if rate != first]
    return ", ".join([first, *others])


def _backends(machine: Machine) -> str:
    """The backend of the default engine, and of others where it is another."""
    if not machine.engines:
        return "none"
    named: list[str] = []
    for engine, speeds in machine.engines.items():
        if speeds.backend not in ("", *named):
            named.append(speeds.backend if engine == DEFAULT else f"{speeds.backend} ({engine})")
    return ", ".join(named)


@dataclass(frozen=True)
class _Nodes:
    nodes: Sequence[tuple[node_pb2.NodeInfo, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fitting(console, options, (self._table(*shape) for shape in SHAPES))
        machines = [Machine.from_proto(info, address) for info, address in self.nodes]
        yield _sum_up(len(machines), sum(machine.usable for machine in machines))
        if (devices := devices_table(self.nodes)) is not None:
            yield ""
            yield devices
        if any(not info.bandwidth_measured for info, _ in self.nodes):
            yield Text("* nominal bandwidth of the chip, not measured", style="dim")

    def _table(self, wide: bool, stack: bool) -> Table:
        versions = {info.version for info, _ in self.nodes}
        version = wide or len(versions) > 1
        serving = any(info.stages for info, _ in self.nodes)
        table = new_table("")
        add_names(table, "machine", *["chip"] * wide)
        add_words(table, "backend")
        add_numbers(table, "usable", "bandwidth")
        add_words(table, *["layers"] * serving, *["version"] * version, *["address"] * (not stack))
        for info, address in sorted(self.nodes, key=lambda node: node[0].name):
            machine = Machine.from_proto(info, address)
            usable = "drained" if info.draining else format_bytes(machine.usable)
            total = format_bytes(info.total_memory)
            layers = ", ".join(_held(spec, info) for spec in info.stages)
            table.add_row(
                *who(info.name, info.chip, wide, *[address] * stack),
                Text(stacked(_installed(info)) if stack else _installed(info)),
                Text("drained" if info.draining else usable).append(
                    f"{' ' if wide else chr(10)}of {total}", "dim"
                ),
                format_rate(info.bandwidth) + (" " if info.bandwidth_measured else "*"),
                *[layers] * serving,
                *[Text(info.version)] * version,
                *[Text(address)] * (not stack),
            )
        return table


def _held(spec: node_pb2.StageSpec, info: node_pb2.NodeInfo) -> str:
    """`10-19`, or `10-19 (orphaned)` where no coordinator holds them any more."""
    layers = layer_range(spec.first_layer, spec.end_layer)
    return f"{layers} (orphaned)" if spec.deployment in info.orphaned else layers


@dataclass(frozen=True)
class _Planned:
    plan: Plan
    variants: ModelVariants
    title: str

    @property
    def layout(self) -> Layout:
        """Layout of the head's variant."""
        engine = self.plan.stages[0].engine
        return next(variant for variant in self.variants.layouts if variant.engine == engine)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._verdict()
        yield ""
        shapes = [(True, 24), (True, 12), (False, 24), (False, 12), (False, 8), (False, 0)]
        stages = fitting(console, options, (self._stages(*shape) for shape in shapes))
        yield stages
        yield ""
        yield self._facts(legend=any(column.header == MEMORY for column in stages.columns))

    def _verdict(self) -> Text:
        """`Fits: 24 tokens/s on 2 of 3 machines`."""
        plan = self.plan
        used, there = len(plan.stages), len(plan.stages) + len(plan.left_out)
        speed = f"{plan.tokens_per_s_single:.3g} tokens/s"
        if plan.users > 1:
            speed += f" for one user, {plan.tokens_per_s_aggregate:.3g} for {plan.users} together,"
        return Text(f"Fits: {speed} on {used} of {counted(there, 'machine')}", "bold")

    def _stages(self, wide: bool, bar: int) -> Table:
        """The stages, with chips and hops in columns if `wide`, and bars of so many columns."""
        layout, users = self.layout, counted(self.layout.users, "user")
        hops = wide and len(self.plan.stages) > 1
        mixed = len(self.plan.engines) > 1
        table = new_table(f"{self.title}: context {layout.context}, {users}, {self.plan.objective}")
        add_names(table, "machine", *["chip"] * wide)
        add_words(table, *["engine"] * mixed)
        add_numbers(table, "layers", "weights", "KV", "free")
        add_bar(table, bar, MEMORY)
        add_numbers(table, "ms/token", *["hop ms"] * hops)
        for stage in self.plan.stages:
            table.add_row(
                *who(stage.machine.name, stage.machine.chip, wide),
                *[stage.engine] * mixed,
                layer_range(stage.first, stage.end),
                format_bytes(stage.weight_bytes),
                format_bytes(stage.kv_bytes),
                format_bytes(stage.free_bytes),
                *[Bar(_memory(stage), bar)] * bool(bar),
                format_ms(stage.seconds_per_token) + ("" if stage.measured else "*"),
                *[format_ms(stage.hop_s) + ("" if stage.hop_measured else "*")] * hops,
            )
        return table

    def _facts(self, *, legend: bool) -> Table:
        plan = self.plan
        drafts = self.layout.draft_bytes
        embedding = format_bytes(self.layout.head_bytes - drafts)
        first, last = plan.stages[0].machine.name, plan.stages[-1].machine.name
        head = f"{first}, with {embedding} of embedding and lm_head"
        if not ENGINES[self.layout.engine].head_makes_logits:
            head = f"{first}, with {embedding} of embedding; "
            head += f"the lm_head is with the last layer, on {last}"
        if drafts:
            head += f", and {format_bytes(drafts)} of draft model"
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column()
        if legend:
            facts.add_row("memory", _Legend())
        facts.add_row("head", Text(head))
        for i, line in enumerate(engine_lines(plan, self.variants)):
            facts.add_row("" if i else "engine", Text(line))
        for i, line in enumerate(reuse_lines(plan, self.variants)):
            facts.add_row("" if i else "reuse", Text(line))
        for i, line in enumerate(share_lines(plan)):
            facts.add_row("" if i else "devices", Text(line))
        if disk := disk_line(plan):
            facts.add_row("disk", Text(disk))
        if plan.hops_s:
            known = "measured" if all(s.hop_measured for s in plan.stages) else "assumed"
            hops = f"{len(plan.stages)}, together {format_ms(plan.hops_s)} ms per token, {known}"
            facts.add_row("hops", hops)
        facts.add_row("bottleneck", Text(plan.bottleneck))
        for i, (reason, names) in enumerate(_by_reason(plan).items()):
            facts.add_row("" if i else "left out", Text(f"{listed(names)}: {reason}"))
        if plan.gap:
            gap = f"another plan could be better by {plan.gap * 100:.2g} % at most"
            facts.add_row("search", Text(gap))
        facts.add_row("predicted", Text(self._speed(), style="bold"))
        if plan.guess_rate:
            speed, gain = plan.tokens_per_s_single * plan.guessing_gain, plan.guessing_gain
            facts.add_row(
                "guessing",
                f"{speed:.3g} tokens/s of a user alone, {gain:.2f} times as many, with "
                f"{plan.guess_rate * 100:.0f} % of guesses right (assumed) and "
                f"{counted(plan.guessing_frames, 'frame')} on their way",
            )
        measured = [s.measured for s in plan.stages] + [
            s.hop_measured for s in plan.stages if s.hop_s
        ]
        if not all(measured):
            rest = "the rest was measured here" if any(measured) else "nothing was measured yet"
            facts.add_row("*", f"assumed: {rest}")
        return facts

    def _speed(self) -> str:
        plan = self.plan
        speed = f"{plan.tokens_per_s_single:.3g} tokens/s"
        if plan.users > 1:
            together = f"{plan.tokens_per_s_aggregate:.3g} for {plan.users} users together"
            speed = f"{speed} for one user, {together}"
        if plan.prefill_tokens_per_s is not None:
            speed = f"{speed}; prompt processing: {plan.prefill_tokens_per_s:.3g} tokens/s"
        return f"{speed}; {format_ms(plan.seconds_per_token)} ms per token"


def _by_reason(plan: Plan) -> dict[str, list[str]]:
    """The names of machines that are left out, by why they are."""
    names: dict[str, list[str]] = {}
    for machine, reason in plan.left_out:
        names.setdefault(reason, []).append(machine.name)
    return names


def _memory(stage: Stage) -> list[tuple[int, Ink]]:
    return [
        (stage.weight_bytes, WEIGHTS),
        (stage.kv_bytes, KV),
        (stage.reserve_bytes, RESERVE),
        (stage.free_bytes, FREE),
    ]


def _sum_up(machines: int, usable: int) -> Text:
    return Text(f"{counted(machines, 'machine')}, {format_bytes(usable)} usable", style="dim")
