"""Loading, machine by machine, as people see it in the terminal."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.planning.placement import Plan, Stage
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
from unicluster.units import format_bytes
from unicluster.v1 import node_pb2

_STATE_STYLES = {
    "waiting": "dim",
    "fetching": "",
    "loading": "",
    "adopted": "green",
    "ready": "green",
    "failed": "bold red",
}


@dataclass
class _Load:
    """How far one machine is."""

    stage: Stage
    state: str = "waiting"
    layers_done: int = 0
    bytes_done: int = 0
    fetched: int = 0
    to_fetch: int = 0
    started: float = field(default_factory=lambda: time.monotonic())
    reason: str = ""


class LoadingBars:
    """Loading, machine by machine: live bars in a terminal, else a line when a state changes.

    A context manager; what is reported after its end is not shown.
    """

    def __init__(self, plan: Plan, console: Console | None = None) -> None:
        self._console = console or Console()
        self._loads = {s.machine.name: _Load(s) for s in plan.stages}
        self._live: Live | None = None
        self._shown = False

    def __enter__(self) -> Self:
        self._shown = True
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=8,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown = False
        if self._live:
            self._live.stop()

    def update(self, machine: str, progress: node_pb2.LoadProgress) -> None:
        """A machine has come further, or begins again after it failed."""
        load = self._loads[machine]
        stage = load.stage
        load.layers_done, load.bytes_done = progress.layers_done, progress.bytes_done
        load.fetched, load.to_fetch = progress.fetched, progress.to_fetch
        if progress.to_fetch:
            if load.state != "fetching":
                size = format_bytes(progress.to_fetch)
                self._enter(load, "fetching", f"{machine}: fetching {size}")
        elif load.state != "loading":
            load.started = time.monotonic()
            layers, size = layer_range(stage.first, stage.end), format_bytes(stage.weight_bytes)
            self._enter(load, "loading", f"{machine}: loading layers {layers}, {size}")

    def adopted(self, machine: str) -> None:
        """A machine has its layers in memory since before."""
        load = self._loads[machine]
        layers = layer_range(load.stage.first, load.stage.end)
        self._enter(load, "adopted", f"{machine}: adopted layers {layers}, loaded before")

    def ready(self, machine: str) -> None:
        """A machine has loaded all its layers, or had when it was adopted."""
        load = self._loads[machine]
        load.layers_done = load.stage.end - load.stage.first
        load.bytes_done = load.stage.weight_bytes
        if load.state == "adopted":
            return
        seconds = time.monotonic() - load.started
        self._enter(load, "ready", f"{machine}: ready after {seconds:.1f} s")

    def failed(self, machine: str, reason: str) -> None:
        """A machine gave up; the reason names it."""
        load = self._loads[machine]
        load.reason = reason
        self._enter(load, "failed", reason)

    def _enter(self, load: _Load, state: str, line: str) -> None:
        load.state = state
        if self._shown and not self._live:
            self._console.print(Text(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        failures = [
            Text(load.reason, style="red")
            for load in self._loads.values()
            if load.state == "failed"
        ]
        options = self._console.options
        table = fitting(self._console, options, (self._table(bar) for bar in (24, 16, 8, 0)))
        return Group(table, *failures)

    def _table(self, bar: int) -> Table:
        """The machines, with a bar of so many columns."""
        table = new_table("Loading")
        add_names(table, "machine")
        add_numbers(table, "layers", "here", "of")
        add_bar(table, bar)
        add_words(table, "")
        for load in self._loads.values():
            stage = load.stage
            done, total = load.bytes_done, stage.weight_bytes
            if load.state == "fetching":
                done, total = load.fetched, load.to_fetch
            table.add_row(
                whole(stage.machine.name),
                f"{load.layers_done}/{stage.end - stage.first}",
                format_bytes(done),
                format_bytes(total),
                *[Bar([(done, WEIGHTS), (total - done, FREE)], bar)] * bool(bar),
                Text(load.state, style=_STATE_STYLES[load.state]),
            )
        return table
