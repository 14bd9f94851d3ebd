"""`unicluster doctor`: checks for common problems, and says how to solve them."""

import asyncio
import time
from collections.abc import Iterable

from rich.markup import escape

from node.doctor import host as this_host
from node.doctor import network
from node.doctor.finding import Finding, Level
from unicluster.cluster.known_machines import peer_option
from unicluster.command_line import Command, Option
from unicluster.terminal.console import Console
from unicluster.trust.keyring import Membership
from unicluster.trust.store import Store

WIDTH = len("certificate")  # the longest subject
_MARKS = {
    Level.OK: "[green]✓[/green]",
    Level.WARNING: "[yellow]![/yellow]",
    Level.ERROR: "[red]✗[/red]",
}


def run(peer: tuple[str, ...], host: str) -> int:
    """Prints the findings. Returns 1 when something will not work, else 0."""
    cluster = Store().load()
    console = Console()
    with console.status("Looking"):
        findings = this_host.examine()
        if cluster is None:
            findings.append(
                Finding(
                    Level.ERROR,
                    "cluster",
                    "this machine is in no cluster",
                    "run `unicluster join`, with `--token -` if the cluster exists",
                )
            )
        else:
            membership = Membership(cluster, Store())
            findings += [*_rotation(), *asyncio.run(network.examine(membership, peer, host))]
    _print(console, findings)
    return int(any(finding.level is Level.ERROR for finding in findings))


def _rotation() -> list[Finding]:
    """Whether an old token is still good."""
    begun = Store().rotation_begun()
    if begun is None:
        return []
    days = max(0.0, time.time() - begun) / 86400
    return [
        Finding(
            Level.WARNING,
            "token",
            f"the token was rotated {days:.1f} days ago, and the old one is still good",
            "`unicluster token rotate --finish`, when all machines and clients have the new one",
        )
    ]


def _print(console: Console, findings: Iterable[Finding]) -> None:
    for finding in findings:
        line = f"{_MARKS[finding.level]} {finding.subject:{WIDTH}} {escape(finding.message)}"
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(f"  {'':{WIDTH}} → {finding.remedy}", soft_wrap=True, markup=False)


command = Command(
    run,
    sections={
        "Network": [
            peer_option("a machine that should be there, to be asked too"),
            Option("--host", "the address that `join --host` was given", default=""),
        ],
    },
    examples=["unicluster doctor", "unicluster doctor --peer studio.local:47600"],
)
