"""`unicluster rebalance`: moves a model's layers to a better plan now, if there is one."""

import asyncio
import sys
from collections.abc import Iterable

import click
import grpc
from rich.table import Table
from rich.text import Text

from coordinator.terminal.tables import add_names, add_numbers, layer_range, new_table, whole
from unicluster.client.client import AsyncClient
from unicluster.cluster.channels import as_error, connect
from unicluster.command_line import Command, Option, server_option
from unicluster.errors import InputError
from unicluster.terminal.console import Console
from unicluster.terminal.waiting import doing
from unicluster.trust.identity import default_name
from unicluster.trust.store import Store
from unicluster.units import format_ms
from unicluster.v1.control_pb2 import (
    PlannedStage,
    PlanSummary,
    RebalanceRequest,
    SurveyReply,
    SurveyRequest,
)
from unicluster.v1.control_pb2_grpc import ControlStub

# All machines are asked, and a plan over many takes a second to search.
SURVEY_SECONDS = 60.0


def run(yes: bool, timeout: float, server: str | None) -> int:
    if not timeout > 0:
        raise InputError(f"--timeout {timeout:g}: a number of seconds, more than 0")
    return asyncio.run(_rebalance(server, timeout, yes=yes))


async def _rebalance(server: str | None, timeout: float, *, yes: bool) -> int:
    """Raises UnavailableError where the move takes longer than `timeout` seconds: it goes on."""
    cluster = Store().require()
    async with AsyncClient(server, cluster=cluster) as client:
        with doing("Looking for what is served"):
            address = await client.find()
    console = Console()
    async with connect(address, cluster.issue(default_name())) as channel:
        stub = ControlStub(channel)
        try:
            with doing("Looking for a better plan"):
                found = await stub.Survey(SurveyRequest(), timeout=SURVEY_SECONDS)
            console.print(_table(found))
            if not found.worth:
                console.print("No other plan is faster: nothing moves.")
                return 0
            saved = f"{found.gain * 100:.0f} %"
            if not yes:
                _ask(f"{found.model} pauses while its layers move. Save {saved} of a token's time?")
            with doing("Moving"):
                await stub.Rebalance(RebalanceRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise as_error(error, f"the coordinator at {address}") from None
    console.print(f"{found.model} answers from the new plan.")
    return 0


def _ask(question: str) -> None:
    """Raises InputError where nobody can be asked, click.Abort where they say no."""
    if not sys.stdin.isatty():
        raise InputError("nobody can be asked here: --yes moves the layers")
    click.confirm(question, abort=True)


def _table(found: SurveyReply) -> Table:
    """A row for each machine of either plan: its layers and milliseconds a token, before and then.

    Machines of the plan that stands come first.
    """
    table = new_table(found.model)
    add_names(table, "machine")
    add_numbers(table, "layers now", "ms/token", "then", "ms/token")
    now, then = _by_machine(found.standing), _by_machine(found.better)
    for name in dict.fromkeys([*now, *then]):
        table.add_row(whole(name), *_cells(now.get(name)), *_cells(then.get(name)))
    plans = found.standing, found.better
    table.add_row(Text("together", "dim"), *_total(plan.token_s for plan in plans))
    table.add_row(Text("the slowest", "dim"), *_total(plan.slowest_s for plan in plans))
    return table


def _by_machine(plan: PlanSummary) -> dict[str, PlannedStage]:
    return {stage.machine: stage for stage in plan.stages}


def _cells(stage: PlannedStage | None) -> tuple[str, str]:
    if stage is None:
        return "", ""
    return layer_range(stage.first_layer, stage.end_layer), format_ms(stage.token_s)


def _total(seconds: Iterable[float]) -> tuple[str, str, str, str]:
    before, then = map(format_ms, seconds)
    return "", before, "", then


command = Command(
    run,
    sections={
        "Moving": [
            Option("--yes", "move without asking", is_flag=True),
            Option(
                "--timeout",
                "how long it may take; then it goes on by itself (default: 600)",
                type=float,
                default=600.0,
                metavar="SECONDS",
            ),
            server_option("default: found by mDNS"),
        ],
    },
    examples=["unicluster rebalance", "unicluster rebalance --yes"],
)
