"""Leftovers of a run once nothing is asked for any more: caches, processes, files."""

import asyncio
import time
from pathlib import Path

import psutil

from tests.chaos.clients import LOOK_SECONDS, SILENCE
from tests.chaos.machines import Machines
from tests.support.cluster import LocalCluster, is_worker
from tests.support.deadlines import scaled
from unicluster.client.answers import ChatInfo
from unicluster.client.client import AsyncClient
from unicluster.errors import UniclusterError

# Open files that a process may have more of at the end: connections to machines that came back.
MORE_FILES = 25


def open_files(machines: Machines) -> dict[int, int]:
    """Open files by process, of agents and `serve`."""
    counts = {}
    for program in (machines.server, *machines.cluster.agents.values()):
        if program.running:
            counts[program.pid] = psutil.Process(program.pid).num_fds()
    return counts


async def at_rest(client: AsyncClient, machines: Machines) -> list[str]:
    """Waits until it answers again and nothing is left; what still is then, a line each."""
    end = time.monotonic() + scaled(SILENCE)
    shown: list[str] = []
    while True:
        try:
            await client.chat("hello", max_tokens=4, temperature=0)
            left = _left(await client.describe(), machines.cluster)
        except UniclusterError as error:
            left = [f"it does not answer any more: {error}"]
        if not left:
            return []
        if left != shown:
            shown = left
            print("waiting, because", "; ".join(left), flush=True)
        if time.monotonic() > end:
            print(machines.server.out, machines.server.err, sep="\n")
            return left
        await asyncio.sleep(LOOK_SECONDS)


def _left(info: ChatInfo, cluster: LocalCluster) -> list[str]:
    left = []
    if info.live_caches:
        left.append(f"{info.live_caches} caches are left on the stages")
    working = [worker for agent in cluster.agents.values() for worker in agent.workers]
    if len(working) != len(info.stages):
        left.append(f"{len(working)} workers are left for {len(info.stages)} stages")
    held = {child.pid for agent in cluster.agents.values() for child in _children(agent.pid)}
    strays = [p.pid for p in cluster.processes() if is_worker(p) and p.pid not in held]
    if strays:
        left.append(f"{len(strays)} workers are left that no agent holds")
    return left


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def files_left(before: dict[int, int], after: dict[int, int]) -> list[str]:
    """Processes with too many more open files than before, a line each."""
    return [
        f"process {pid} has {after[pid]} open files, {count} before"
        for pid, count in before.items()
        if pid in after and after[pid] > count + MORE_FILES
    ]


def folders_left(folder: Path, killed: int) -> list[str]:
    """Working folders of workers that are gone; a killed agent can't remove those it had."""
    left = list(folder.glob("unicluster-worker-*"))
    return [f"{len(left)} folders of workers are left"] if len(left) > 2 * killed else []
