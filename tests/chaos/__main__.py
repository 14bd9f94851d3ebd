"""Faults at random times while answers of all kinds stream: is each the one that it should be?

    python -m tests.chaos [--faults N] [--seed N] [--minutes N] [--slow SECONDS] [--json FILE]

A tiny model on five machines behind `unicluster serve`, real processes, mTLS on; two machines are
more than are needed. Where root may make them, each machine has a network namespace of its own,
sees nothing of the model's folder, and has its files on a disk that can be filled. Every answer is
known from before the first fault. With faults beneath it, an answer must come out the same, or end
with a typed error after a part of it that is right.

Ends with exit code 1 if any text is wrong, repeated or cut off, any stream stands still, any cache,
worker, file or file descriptor is left at the end, or `serve` ends so that its unit would not start
it again; and where so little happened that nothing is proven. How many faults there are in a time
is the machine's affair, and no reason to fail.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.fleet.local import inspect
from coordinator.planning.planner import Layout, least_memory
from tests.chaos.clients import Clients
from tests.chaos.faults import Faults, Kind
from tests.chaos.kept import SLOW_SECONDS, Timeline, keep, why_keep
from tests.chaos.left import at_rest, files_left, folders_left, open_files
from tests.chaos.machines import CONTEXT, USERS, Machines
from tests.chaos.network import Lan, lan
from tests.chaos.points import Points
from tests.chaos.report import table, too_little
from tests.support.cluster import LocalCluster, endless_model
from tests.support.deadlines import scaled
from tests.support.mounts import can_mount, small_disk
from tests.support.netns import why_not
from unicluster.client.client import AsyncClient
from unicluster.deadlines import VARIABLE
from unicluster.v1.node_pb2 import InspectRequest

MACHINES = ("ann", "bob", "cat", "dan", "eve")
# As few as hold the model: two may be gone, and it still fits.
STAGES = 3
# Seconds without progress after which a process counts as stuck, on an idle machine.
FROZEN = 2.0
# A part of the clients has its answers kept for so long while its connection is lost.
AWAY = 60.0
# Between two light faults, which wait for nothing.
LIGHT_PAUSE = (0.6, 2.4)
# From when answers go on to the next heavy fault; with this chance it does not wait for them.
HEAVY_PAUSE, AT_ONCE_CHANCE = (0.5, 3.0), 0.12
# However long the start took.
LEAST_SECONDS = 60.0
DISK = "24m"


async def strike(
    faults: Faults, clients: Clients, count: int, until: float, seed: int, timeline: Timeline
) -> None:
    """So many faults, or as many as there is time for; most fall into answers that go on.

    Heavy ones follow each other once answers go on, light ones fall all the time.
    """
    began, at = time.monotonic(), 0

    async def strikes(kinds: Sequence[Kind], dice: random.Random, *, wait: bool) -> None:
        nonlocal at
        while at < count and time.monotonic() < until:
            if wait and dice.random() > AT_ONCE_CHANCE:
                await clients.moving(until)
            await asyncio.sleep(dice.uniform(*(HEAVY_PAUSE if wait else LIGHT_PAUSE)))
            if at >= count or time.monotonic() > until:
                return
            at += 1
            number, kind = at, await faults.strike(kinds, dice)
            print(f"{time.monotonic() - began:6.1f} s, fault {number}: {kind}", flush=True)
            timeline.note(f"fault {number}: {kind}")

    await asyncio.gather(
        strikes(faults.heavy, random.Random(f"{seed} heavy"), wait=True),
        strikes(faults.light, random.Random(f"{seed} light"), wait=False),
    )
    await faults.healed()


async def chaos(
    folder: Path,
    count: int,
    seed: int,
    minutes: float,
    net: Lan | None,
    disk: Path | None,
    timeline: Timeline,
) -> dict[str, Any]:
    """Runs it; returns what is printed."""
    begun = time.monotonic()
    dice = random.Random(seed)
    model = endless_model(folder / "llama")
    request = InspectRequest(model=str(model), context=CONTEXT, users=USERS)
    memory = least_memory(Layout.from_proto(await inspect(request)), STAGES)
    frozen = scaled(FROZEN)
    points = Points(folder / "points", dice)
    (temporary := folder / "tmp").mkdir()
    (files := (disk or folder) / "machines").mkdir()
    cluster = LocalCluster(
        folder / "cluster",
        home=disk / "home" if disk is not None else None,
        **{VARIABLE: str(frozen), "TMPDIR": str(temporary)},
    )
    machines = Machines(cluster, model, memory, points, net, files, hidden=can_mount())
    faults = Faults(machines, frozen, points, net, disk)
    with cluster:
        machines.begin(*MACHINES)
        address, members = machines.server.address, cluster.cluster
        async with (
            AsyncClient(address, cluster=members) as client,
            AsyncClient(address, cluster=members, resume=scaled(AWAY)) as away,
        ):
            clients = Clients((client, away), dice, machines.note_stages, timeline.note)
            await clients.learn()
            print(f"all answers are known; seed {seed}", flush=True)
            before = open_files(machines)
            until = max(begun + 60 * minutes, time.monotonic() + LEAST_SECONDS)
            struck_at = time.monotonic()
            supervision = asyncio.create_task(machines.supervise())
            await clients.ask_until(
                asyncio.create_task(strike(faults, clients, count, until, seed, timeline))
            )
            seconds = time.monotonic() - struck_at
            left = await at_rest(client, machines)
            supervision.cancel()
            left += files_left(before, open_files(machines))
    killed = sum(n for kind, n in faults.struck.items() if "killed" in kind or "panic" in kind)
    left += folders_left(temporary, killed)
    return {
        "seed": seed,
        "seconds": seconds,
        "whole_seconds": time.monotonic() - begun,
        "faults": dict(faults.struck),
        "acted": acted(cluster),
        "answers": dict(clients.ended),
        "refused": clients.refused,
        "errors": dict(clients.errors),
        "gaps": sorted(clients.gaps),
        "parts": clients.parts,
        "gave_up": machines.gave_up,
        "wrong": clients.wrong + machines.wrong + left,
    }


def acted(cluster: LocalCluster) -> list[str]:
    """Places whose failpoints acted, as programs of the cluster have logged it."""
    logs = [path.read_text(errors="replace") for path in cluster.folder.glob("*.err")]
    return sorted({place for log in logs for place in re.findall(r" failpoint ([a-z_.]+):", log)})


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=6.0, help="no fault after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--slow",
        type=float,
        default=SLOW_SECONDS,
        metavar="SECONDS",
        help="of a stream's silence, or a part of a recovery: above it the logs are kept, as they "
        "are of a run that goes wrong",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, lan(*MACHINES) as net:
        folder = Path(temporary)
        with small_disk(folder / "disk", DISK) as disk:
            for lack in lacks(net, disk):
                print(f"left out: {lack}", flush=True)
            if net is not None:
                net.enter_door()
            limits = options.faults, options.seed, options.minutes
            logs, timeline, kept = folder / "cluster", Timeline(), None
            try:
                found = asyncio.run(chaos(folder, *limits, net, disk, timeline))
            except BaseException as error:
                reasons = [f"the run ended: {type(error).__name__}: {error}"]
                print(f"logs are kept in {keep(logs, timeline, reasons)}", flush=True)
                raise
            if reasons := why_keep(found, options.slow):
                kept = keep(logs, timeline, reasons)
    print(table(found, options.faults))
    if kept is not None:
        print(*(reason for reason in reasons if not reason.startswith("WRONG")), sep="\n")
        print(f"logs are kept in {kept}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["wrong"] or too_little(found)))


def lacks(net: Lan | None, disk: Path | None) -> list[str]:
    """Faults that this machine has no means for, a line each."""
    lacks = net.lacks() if net is not None else [f"all faults of the network: {why_not()}"]
    if disk is None:
        lacks.append("full disks: only root may mount a small one")
    if not can_mount():
        lacks.append("fetching: only root of a Linux machine can hide a folder from a process")
    return lacks


if __name__ == "__main__":
    main()
