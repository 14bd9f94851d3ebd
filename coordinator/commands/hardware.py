"""`unicluster hardware`: the machines that `plan --fleet` knows."""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.planning.hardware import boxes
from unicluster.units import format_bytes, format_rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sources", action="store_true", help="where each figure is from")


def run(args: argparse.Namespace) -> int:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("machine", no_wrap=True)
    for header in ("memory", "usable", "bandwidth", "TFLOPS", "price", "link"):
        table.add_column(header, justify="right", no_wrap=True)
    if args.sources:
        table.add_column("source", style="dim")
    for found in boxes().values():
        table.add_row(
            found.name,
            f"{found.memory >> 30} GiB",
            format_bytes(found.usable),
            format_rate(found.bandwidth),
            f"{found.compute / 1e12:.3g}" if found.compute else "",
            f"${found.price}" if found.price else "",
            found.link,
            *[Text(found.source)] * args.sources,
        )
    Console().print(table)
    return 0
