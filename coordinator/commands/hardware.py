"""`unicluster hardware`: the machines that `plan --fleet` knows."""

from dataclasses import dataclass

from rich.console import ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from coordinator.planning.hardware import Box, boxes
from coordinator.terminal.tables import add_names, add_numbers, fitting, new_table, whole
from unicluster.command_line import Command, Option
from unicluster.terminal.console import Console
from unicluster.units import format_bytes, format_rate

HEADERS = ("memory", "usable", "bandwidth", "TFLOPS", "price", "link")


def run(sources: bool) -> int:
    Console().print(_Boxes(sources))
    return 0


@dataclass(frozen=True)
class _Boxes:
    """The catalogue, without the last columns where they don't fit."""

    sources: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = (self._table(columns) for columns in range(len(HEADERS), 2, -1))
        yield fitting(console, options, tables) if not self.sources else self._table(len(HEADERS))

    def _table(self, columns: int) -> Table:
        table = new_table("")
        add_names(table, "machine")
        add_numbers(table, *HEADERS[:columns])
        if self.sources:
            table.add_column("source", style="dim")
        for entry in boxes().values():
            figures = (
                f"{entry.memory >> 30} GiB",
                _usable(entry),
                format_rate(entry.bandwidth),
                f"{entry.compute / 1e12:.3g}" if entry.compute else "",
                f"${entry.price}" if entry.price else "",
                entry.link,
            )
            table.add_row(
                whole(entry.name), *figures[:columns], *[Text(entry.source)] * self.sources
            )
        return table


def _usable(entry: Box) -> str:
    """Usable memory of the GPU, and that of engines which reach another."""
    others = {
        f"{engine} {format_bytes(speeds.usable)}"
        for engine, speeds in entry.engines.items()
        if speeds.usable is not None and speeds.usable != entry.usable
    }
    return "\n".join([format_bytes(entry.usable), *sorted(others)])


command = Command(
    run,
    sections={"Table": [Option("--sources", "where each figure is from", is_flag=True)]},
    examples=["unicluster hardware --sources"],
)
