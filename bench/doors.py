"""Cost of the HTTP door: the time between tokens over HTTP beside that over gRPC, in the same run.

    python -m bench.doors [--rounds N] [--idle N]

The demo model over two agents on this machine, one user, greedy. Each round streams the same
answer over gRPC and over HTTP, in an order that turns from round to round, so that drift hits both
alike; with --idle, so many more connections are kept alive meanwhile that ask nothing. The door's
cost is the difference of the medians, over all answers, of an answer's time per token: tokens that
come in a burst count as the time that they took. Client and door share a process and its event
loop, so that the client's own work is part of what is compared.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from statistics import median
from urllib.parse import urlsplit

import httpx

from coordinator.commands.serve import served
from coordinator.fleet import local
from coordinator.models.catalog import resolve
from coordinator.serving.events import Events
from coordinator.serving.options import HttpOptions, ServeOptions
from unicluster.client.answers import Delta
from unicluster.client.client import AsyncClient

MACHINES = ("north", "south")
PROMPT = "A tiny story about a fox:"
TOKENS = 40


async def over_grpc(client: AsyncClient) -> list[float]:
    """When each token of one answer came, by time.perf_counter."""
    at = []
    async for event in client.stream(PROMPT, temperature=0, max_tokens=TOKENS):
        if isinstance(event, Delta):
            at.append(time.perf_counter())
    return at


async def over_http(client: httpx.AsyncClient) -> list[float]:
    """When each token of one answer came, by time.perf_counter."""
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": True,
    }
    at = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            if choice["delta"].get("content"):
                at.append(time.perf_counter())
    return at


@contextlib.asynccontextmanager
async def idle(url: str, count: int) -> AsyncIterator[None]:
    """So many connections that have asked once, and are kept alive."""
    where = urlsplit(url)
    writers = []
    try:
        for _ in range(count):
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            writers.append(writer)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        yield
    finally:
        for writer in writers:
            writer.close()


async def measure(rounds: int, idle_count: int) -> dict[str, list[float]]:
    """Seconds per token of each round's answer, by door."""
    steps: dict[str, list[float]] = {"gRPC": [], "HTTP": []}
    with local.own_cluster() as cluster:
        async with local.agents(MACHINES, 1 << 30):
            options = ServeOptions(
                source=resolve("demo"),
                context=512,
                nodes=list(MACHINES),
                host=local.HOST,
                port=0,
                http=HttpOptions(port=0),
            )
            async with served(options, cluster, Events()) as running:
                assert running.http is not None
                url = running.http.url
                async with (
                    AsyncClient(running.address, cluster=cluster) as grpc,
                    httpx.AsyncClient(base_url=url, timeout=60) as http,
                    idle(url, idle_count),
                ):
                    await over_grpc(grpc)
                    await over_http(http)
                    for number in range(rounds):
                        doors = ["gRPC", "HTTP"]
                        for door in doors if number % 2 else reversed(doors):
                            at = await (over_grpc(grpc) if door == "gRPC" else over_http(http))
                            steps[door].append((at[-1] - at[0]) / (len(at) - 1))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--idle", type=int, default=0)
    args = parser.parse_args()
    steps = asyncio.run(measure(args.rounds, args.idle))
    for door, seconds in steps.items():
        print(f"{door}: {median(seconds) * 1e3:.2f} ms per token, of {len(seconds)} answers")
    added = median(steps["HTTP"]) - median(steps["gRPC"])
    print(f"HTTP adds {added * 1e3:.2f} ms per token, with {args.idle} idle connections")


if __name__ == "__main__":
    main()
