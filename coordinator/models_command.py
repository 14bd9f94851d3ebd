"""`unicluster models`: the catalogue, and what its models weigh in each quantization.

The sizes are computed from the configurations, and committed: `python -m coordinator.sizes`.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from coordinator.catalog import QUANTS, entries
from coordinator.sizes import stored
from unicluster.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repos", action="store_true", help="where the weights are on the hub")


def run(args: argparse.Namespace) -> int:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for quant in QUANTS:
        table.add_column("as made" if quant == "none" else quant, justify="right", no_wrap=True)
    if args.repos:
        table.add_column("hub", style="dim")
    for entry in entries():
        sizes = stored()[entry.id]
        weights = [sizes["bytes"].get(quant) for quant in QUANTS]
        repos = "\n".join([entry.hf, *entry.mlx.values()])
        table.add_row(
            entry.id,
            f"{sizes['parameters'] / 1e9:.1f} B",
            *("" if size is None else format_bytes(size) for size in weights),
            *[repos] * args.repos,
        )
    Console().print(table)
    return 0
