"""`unicluster nodes`: what is out there."""

import argparse
import asyncio

from rich.console import Console
from rich.live import Live

from coordinator.fleet.members import NOBODY, Members
from coordinator.terminal.plan import nodes_table
from unicluster.cluster.trust import Store, default_name
from unicluster.errors import UnavailableError

REFRESH_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="keep the table up to date")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a machine that multicast does not reach",
    )


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_nodes(args))


async def _nodes(args: argparse.Namespace) -> int:
    cluster = Store().require()
    console = Console()
    async with Members(cluster, cluster.issue(default_name()), args.peer) as members:
        await members.search()
        nodes = await members.nodes()
        if args.watch:
            with Live(nodes_table(nodes), console=console, auto_refresh=False) as live:
                while True:
                    await members.changed(REFRESH_SECONDS)
                    live.update(nodes_table(await members.nodes()), refresh=True)
        if not nodes:
            raise UnavailableError(NOBODY)
        console.print(nodes_table(nodes))
    return 0
