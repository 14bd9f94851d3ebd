"""Faults at random times while answers of all kinds stream: is each the one that it should be?

    python -m tests.chaos [--faults N] [--seed N] [--minutes N] [--json FILE]

A tiny model on five agents behind `unicluster serve`, real processes, mTLS on; some machines are
more than are needed. Each machine has a network namespace of its own, where root may make them.
Every answer is known from before the first fault. With faults beneath it, an answer must come out
the same, or end with a typed error after a part of it that is right. Ends with exit code 1 if any
text is wrong, repeated or cut off, any stream stands still, or any cache, worker, file or file
descriptor is left at the end.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from coordinator.fleet.local import inspect
from coordinator.planning.planner import Layout, least_memory
from tests.chaos.clients import SILENCE, Clients
from tests.chaos.faults import Faults
from tests.chaos.left import at_rest, files_left, folders_left, open_files
from tests.chaos.network import DOOR, Lan, lan
from tests.chaos.points import Points
from tests.chaos.report import table
from tests.support.cluster import HOST, AgentProgram, LocalCluster, ServeProgram, endless_model
from tests.support.deadlines import scaled
from tests.support.mounts import small_disk
from unicluster.client.client import AsyncClient
from unicluster.cluster.channels import split_address
from unicluster.deadlines import VARIABLE
from unicluster.v1.node_pb2 import InspectRequest

MACHINES = ("ann", "bob", "cat", "dan", "eve")
# As few as hold the model: two may be gone, and it still fits.
STAGES = 3
CONTEXT = 2048
USERS = 4
# Seconds without progress after which a process counts as stuck, on an idle machine.
FROZEN = 2.0
# Between two faults; with this chance there is no pause at all.
PAUSE, AT_ONCE_CHANCE = (0.1, 1.0), 0.1
DISK = "4m"


async def strike(
    faults: Faults, clients: Clients, count: int, until: float, dice: random.Random
) -> None:
    """So many faults, or as many as there is time for; most fall into answers that go on."""
    began = time.monotonic()
    for at in range(1, count + 1):
        if time.monotonic() > until:
            break
        kind = await faults.strike()
        print(f"{time.monotonic() - began:6.1f} s, fault {at}: {kind}", flush=True)
        if dice.random() > AT_ONCE_CHANCE:
            await clients.moving(SILENCE / 2)
            await asyncio.sleep(dice.uniform(*PAUSE))
    await faults.healed()


async def chaos(
    folder: Path, count: int, seed: int, minutes: float, net: Lan | None, disk: Path | None
) -> dict[str, Any]:
    """Runs it; returns what is printed."""
    dice = random.Random(seed)
    model = endless_model(folder / "llama")
    request = InspectRequest(model=str(model), context=CONTEXT, users=USERS)
    memory = least_memory(Layout.from_proto(await inspect(request)), STAGES)
    frozen = scaled(FROZEN)
    points = Points(folder / "points", dice)
    temporary = folder / "tmp"
    temporary.mkdir()
    cluster = LocalCluster(folder / "cluster", **{VARIABLE: str(frozen), "TMPDIR": str(temporary)})
    port = ["0"]

    def start(name: str) -> AgentProgram:
        return cluster.start_agent(
            name,
            *(("--cache-dir", str(disk / name)) if disk is not None else ()),
            memory=memory,
            host=net.address(name) if net is not None else HOST,
            prefix=net.prefix(name) if net is not None else (),
            spare=True,
            **points.variables(name),
        )

    def serve() -> ServeProgram:
        host = net.address(DOOR) if net is not None else HOST
        options = ("--context", str(CONTEXT), "--users", str(USERS), "--grpc-port", port[0])
        kept = ("--cache-disk", "1MB") if disk is not None else ()
        return cluster.serve(model, *options, "--host", host, *kept, env=points.variables(DOOR))

    with cluster:
        for name in MACHINES:
            start(name)
        cluster.wait_for_agents()
        faults = Faults(cluster, start, serve, frozen, dice, points, net, disk)
        address = faults.server.address
        port[0] = str(split_address(address)[1])
        async with AsyncClient(address, cluster=cluster.cluster) as client:
            clients = Clients(client, dice)
            await clients.learn()
            print(f"all answers are known; seed {seed}", flush=True)
            files = open_files(cluster, faults)
            begun = time.monotonic()
            supervision = asyncio.create_task(faults.supervise())
            work = strike(faults, clients, count, begun + 60 * minutes, dice)
            await clients.ask_until(asyncio.create_task(work))
            seconds = time.monotonic() - begun
            clients.wrong += await at_rest(client, cluster, faults)
            supervision.cancel()
            clients.wrong += files_left(files, open_files(cluster, faults))
    killed = sum(faults.struck[kind] for kind in ("agent killed", "machine killed"))
    acted = [line.split("failpoint ")[1] for line in logged(cluster, "failpoint")]
    panics = sum("panic" in each for each in acted)
    clients.wrong += folders_left(temporary, killed + panics)
    return {
        "seed": seed,
        "seconds": seconds,
        "faults": dict(faults.struck),
        "reached": dict(
            Counter(line.split("failpoint ")[1] for line in logged(cluster, "failpoint"))
        ),
        "answers": dict(clients.ended),
        "refused": clients.refused,
        "errors": dict(clients.errors),
        "gaps": sorted(clients.gaps),
        "parts": clients.parts,
        "gave_up": faults.gave_up,
        "wrong": clients.wrong,
    }


def logged(cluster: LocalCluster, word: str) -> list[str]:
    """Lines that programs of the cluster have logged with that word."""
    logs = (path.read_text(errors="replace") for path in cluster.folder.glob("*.err"))
    return [line for log in logs for line in log.splitlines() if f" {word} " in line]


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0, help="no fault after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, lan(*MACHINES) as net:
        folder = Path(temporary)
        with small_disk(folder / "disk", DISK) as disk:
            if net is not None:
                net.enter_door()
            limits = options.faults, options.seed, options.minutes
            found = asyncio.run(chaos(folder, *limits, net, disk))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
