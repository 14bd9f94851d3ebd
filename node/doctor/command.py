"""`unicluster doctor`: looks for what usually goes wrong, and says how to mend it."""

import argparse
import asyncio
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from node.doctor import host, network
from node.doctor.finding import Finding, Level
from unicluster.cluster.trust import Store

_MARKS = {
    Level.GOOD: "[green]✓[/green]",
    Level.ODD: "[yellow]![/yellow]",
    Level.BAD: "[red]✗[/red]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a machine that should be there, to be asked too",
    )
    parser.add_argument("--host", default="", help="the address that `join --host` was given")


def run(args: argparse.Namespace) -> int:
    """1 when something will not work, else 0."""
    cluster = Store().load()
    console = Console()
    with console.status("Looking"):
        findings = host.examine()
        if cluster is None:
            findings.append(
                Finding(
                    Level.BAD,
                    "cluster",
                    "this machine is in no cluster",
                    "run `unicluster join`, with --token if the cluster exists",
                )
            )
        else:
            findings += asyncio.run(network.examine(cluster, args.peer, args.host))
    _print(console, findings)
    return int(any(finding.level is Level.BAD for finding in findings))


def _print(console: Console, findings: Iterable[Finding]) -> None:
    for finding in findings:
        line = f"{_MARKS[finding.level]} {finding.subject:10} {escape(finding.what)}"
        console.print(line, soft_wrap=True)
        if finding.mend:
            console.print(f"  {'':10} → {finding.mend}", soft_wrap=True, markup=False)
