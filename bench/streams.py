"""Many clients that stream for two minutes: no error, no stalled stream, and flat memory?

    python -m bench.streams [--clients 64] [--seconds 120]

The demo model over three agents on this machine, all real processes, mTLS on. Each client has a
connection of its own, and streams answers of 10 to 64 tokens from OpenAI's, Anthropic's or
Ollama's path, one after another. A stream is stalled where it has no piece for 30 s. Each process
may hold 3 % more memory afterwards than before at most: both times at rest, after answers that fill
the context have pushed out all other caches, and the first time after 15 s of streams. Ends with
exit code 1 where any of that is not so.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from bench.soak import MACHINES, memory
from coordinator.fleet.local import inspect
from coordinator.planning.planner import Layout, least_memory
from tests.support.cluster import ROOT, LocalCluster, ServeProgram, until
from tests.support.many_streams import Streams, stream_from_many
from unicluster.v1.node_pb2 import InspectRequest

DEMO = ROOT / "node" / "demo" / "model"
CONTEXT = 192
STALLED_SECONDS = 30.0
WARM_SECONDS = 15.0
GROWTH = 0.03
RESTS = 2


async def at_rest(cluster: LocalCluster, server: ServeProgram, clients: int) -> dict[str, int]:
    """Resident bytes of each process after answers that fill the context."""
    prompt = [1] * (CONTEXT - 4)
    async with server.async_client() as client:
        for _ in range(RESTS):
            fill = (client.chat(prompt, max_tokens=4, no_reuse=True) for _ in range(clients))
            await asyncio.gather(*fill)
    with server.client() as other:
        until(lambda: not other.describe().live_caches, "the caches of all answers are freed")
    return memory(cluster, server)


async def measure(
    cluster: LocalCluster, server: ServeProgram, clients: int, seconds: float
) -> tuple[Streams, dict[str, int], dict[str, int]]:
    """Results of the streams, and the memory before and after them."""

    async def stream(seconds: float, seed: int) -> Streams:
        return await stream_from_many(
            server.http, clients, seconds, stalled_s=STALLED_SECONDS, seed=seed
        )

    await stream(WARM_SECONDS, seed=1)
    before = await at_rest(cluster, server, clients)
    streams = await stream(seconds, seed=2)
    return streams, before, await at_rest(cluster, server, clients)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    request = InspectRequest(model=str(DEMO), context=CONTEXT, users=options.clients)
    layout = Layout.from_proto(asyncio.run(inspect(request)))
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        cluster.start_agents(*MACHINES, memory=least_memory(layout, len(MACHINES)))
        settings = ("--context", str(CONTEXT), "--users", str(options.clients))
        with cluster.serve(DEMO, *settings) as server:
            stages = len(server.describe().stages)
            streams, before, after = asyncio.run(
                measure(cluster, server, options.clients, options.seconds)
            )
    wrong = list(streams.wrong)
    print(f"{options.clients} clients, {options.seconds:.0f} s, {stages} stages")
    print(
        f"{streams.ended.total()} answers, {streams.pieces} pieces, {len(streams.wrong)} errors, "
        f"longest gap {streams.longest_gap:.2f} s"
    )
    for path, count in sorted(streams.ended.items()):
        print(f"  {path:24}{count:6}")
    for name, size in before.items():
        grown = after[name] / size - 1
        print(f"  {name:16}{size / 1e6:8.1f} MB{after[name] / 1e6:8.1f} MB{grown:+8.1%}")
        if grown > GROWTH:
            wrong.append(f"{name} grew by {grown:.1%}")
    for what in wrong[:20]:
        print(f"WRONG: {what}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
