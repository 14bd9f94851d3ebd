"""`unicluster hardware`: the machines that `plan --fleet` knows."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.planning.hardware import boxes
from unicluster.command_line import Command, Option
from unicluster.units import format_bytes, format_rate


def run(sources: bool) -> int:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("machine", no_wrap=True)
    for header in ("memory", "usable", "bandwidth", "TFLOPS", "price", "link"):
        table.add_column(header, justify="right", no_wrap=True)
    if sources:
        table.add_column("source", style="dim")
    for entry in boxes().values():
        table.add_row(
            entry.name,
            f"{entry.memory >> 30} GiB",
            format_bytes(entry.usable),
            format_rate(entry.bandwidth),
            f"{entry.compute / 1e12:.3g}" if entry.compute else "",
            f"${entry.price}" if entry.price else "",
            entry.link,
            *[Text(entry.source)] * sources,
        )
    Console().print(table)
    return 0


command = Command(
    run,
    sections={"Table": [Option("--sources", "where each figure is from", is_flag=True)]},
    examples=["unicluster hardware --sources"],
)
