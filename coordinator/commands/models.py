"""`unicluster models`: the catalogue, and what its models weigh in each quantization.

The sizes are computed from the configurations, and committed: `python -m coordinator.models.sizes`.
"""

from rich.table import Table

from coordinator.models.catalog import QUANTS, entries
from coordinator.models.sizes import stored
from coordinator.terminal.tables import add_numbers, new_table
from unicluster.command_line import Command, Option
from unicluster.terminal.console import Console


def run(repos: bool) -> int:
    Console().print(_repositories() if repos else _sizes())
    return 0


def _sizes() -> Table:
    table = new_table("Parameters in billions, weights in GB")
    table.add_column("model", no_wrap=True)
    add_numbers(table, "params", *("as is" if quant == "none" else quant for quant in QUANTS))
    for entry in entries():
        sizes = stored()[entry.id]
        weights = [sizes["bytes"].get(quant) for quant in QUANTS]
        table.add_row(entry.id, *(_billions(n) for n in (sizes["parameters"], *weights)))
    return table


def _repositories() -> Table:
    table = new_table("")
    table.add_column("model", no_wrap=True)
    table.add_column("on the hub", overflow="fold")
    for entry in entries():
        table.add_row(entry.id, "\n".join([entry.hf, *entry.mlx.values()]))
    return table


def _billions(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.0f}" if number >= 1e11 else f"{number / 1e9:.1f}"


command = Command(
    run,
    sections={"Table": [Option("--repos", "where the weights are on the hub", is_flag=True)]},
    examples=["unicluster models --repos"],
)
