"""`unicluster nodes`: the machines of the cluster."""

import asyncio
from collections.abc import Sequence

from coordinator.fleet.members import NOBODY, Members
from coordinator.terminal.plan import nodes_table
from coordinator.terminal.watch import watching
from unicluster.cluster.known_machines import peer_option
from unicluster.command_line import Command, Option
from unicluster.errors import UnavailableError
from unicluster.terminal.console import Console
from unicluster.terminal.waiting import doing
from unicluster.trust.identity import default_name
from unicluster.trust.store import Store

REFRESH_SECONDS = 2.0


def run(watch: bool, peer: tuple[str, ...]) -> int:
    return asyncio.run(_nodes(peer, watch=watch))


async def _nodes(peers: Sequence[str], *, watch: bool) -> int:
    cluster = Store().require()
    console = Console()
    async with Members(cluster, cluster.issue(default_name()), peers) as members:
        with doing("Looking for machines"):
            await members.find()
            nodes = await members.nodes()
        if watch:
            with watching(console) as show:
                while True:
                    show(nodes_table(nodes) if nodes else NOBODY)
                    await members.changed(REFRESH_SECONDS)
                    nodes = await members.nodes()
        if not nodes:
            raise UnavailableError(NOBODY)
        console.print(nodes_table(nodes))
    return 0


command = Command(
    run,
    sections={
        "Machines": [
            Option("--watch", "keep the table up to date", is_flag=True),
            peer_option("a machine that multicast does not reach"),
        ],
    },
    examples=["unicluster nodes --watch"],
)
