"""Subjects of `bench.real`: deployments as their clients reach them, llama.cpp and mlx-lm."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.llamacpp import RpcServers, has_rpc
from coordinator.commands.baselines import Baseline, ring, running
from coordinator.programs import BASELINE
from node.ggml.load import THREADS_ENV
from tests.support.cluster import LocalCluster
from unicluster.benchmark.bench import of_client
from unicluster.benchmark.measure import Ask, timed

CONTEXT = "2048"
STARTED = 600.0
# Memory of each of so many agents, by which the model takes just as many.
MEMORY = {
    "ggml": {1: "1GB", 2: "140MB", 3: "90MB"},
    "mlx": {1: "2GB", 2: "500MB", 3: "240MB"},
}
LIBRARIES = "LLAMA_CPP_LIB_PATH"  # of llama-cpp-python: the folder of the libraries that it loads


@dataclass(frozen=True)
class Times:
    """Seconds of one answer: to its first token, and of each token after that."""

    first: float
    step: float


Subject = Callable[[Sequence[int], int], Awaitable[Times]]
"""Asks for an answer of some tokens at most, after a prompt of token ids."""


def of_ask(ask: Ask) -> Subject:
    async def answered(prompt: Sequence[int], tokens: int) -> Times:
        answer = await timed(ask, prompt, tokens)
        steps = max(len(answer.at) - 1, 1)
        return Times(answer.first_s, (answer.at[-1] - answer.at[0]) / steps)

    return answered


def over_http(client: httpx.AsyncClient) -> Subject:
    """By the OpenAI door, where an end token ends the answer."""

    async def answered(prompt: Sequence[int], tokens: int) -> Times:
        body = {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked, at, count = time.perf_counter(), [], 0
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if any(choice["text"] for choice in chunk["choices"]):
                    at.append(time.perf_counter())
                count = (chunk.get("usage") or {}).get("completion_tokens", count)
        return Times(at[0] - asked, (at[-1] - at[0]) / max(count - 1, 1))

    return answered


@contextlib.asynccontextmanager
async def served(
    folder: Path, model: Path, engine: str, stages: int, threads: str = ""
) -> AsyncIterator[dict[str, Subject]]:
    """Both doors of a deployment over agents here; `threads` of ggml's stages: "" by default."""
    environment = {THREADS_ENV: threads} if threads else {}
    with LocalCluster(folder, **environment) as cluster:
        names = [f"machine-{number}" for number in range(stages)]
        await asyncio.to_thread(cluster.start_agents, *names, memory=MEMORY[engine][stages])
        server = cluster.serve(model, "--context", CONTEXT)
        await asyncio.to_thread(server.wait_for, "Ctrl-C unloads", STARTED)
        loaded = len(server.describe().stages)
        if loaded != stages:
            raise SystemExit(f"{stages} machines were to have a stage, and {loaded} have")
        url = server.http
        async with (
            server.async_client() as client,
            httpx.AsyncClient(base_url=url, timeout=STARTED) as http,
        ):
            name = f"{stages} stages" if stages > 1 else "1 stage"
            name += f", {threads} threads each" if threads else ""
            doors = {f"{name}, gRPC": of_ask(of_client(client))}
            yield doors if threads else {**doors, f"{name}, HTTP": over_http(http)}


@contextlib.asynccontextmanager
async def llama_cpp(
    file: Path, stages: Sequence[int], libraries: Path | None
) -> AsyncIterator[dict[str, Subject]]:
    """llama.cpp in a process, with one thread and with all cores, and over RPC if it has that.

    libraries: the folder of a llama.cpp built with RPC; None: that which is installed.
    """
    one = {THREADS_ENV: "1", "OMP_NUM_THREADS": "1"}
    elsewhere = {LIBRARIES: str(libraries)} if libraries is not None else {}
    async with contextlib.AsyncExitStack() as stack:

        async def added(*command: str, **settings: str) -> Subject:
            return await _subject(stack, running(*command, settings=[settings]))

        subjects = {
            "llama.cpp, one thread": await added(BASELINE, str(file), **one),
            "llama.cpp, all cores": await added(BASELINE, str(file)),
        }
        if elsewhere or has_rpc():
            for count in (count for count in stages if count > 1):
                servers = stack.enter_context(RpcServers(count, elsewhere | one))
                command = ("bench.llamacpp", "answer", str(file), *servers.endpoints)
                name = f"llama.cpp's RPC, {count} servers of one thread"
                subjects[name] = await added(*command, **elsewhere, **one)
        yield subjects


@contextlib.asynccontextmanager
async def mlx_lm(folder: Path, stages: Sequence[int]) -> AsyncIterator[dict[str, Subject]]:
    """mlx-lm in one process, and over its ring."""
    async with contextlib.AsyncExitStack() as stack:
        model = str(folder)
        subjects = {"mlx-lm, one process": await _subject(stack, running(BASELINE, model))}
        for count in (count for count in stages if count > 1):
            subjects[f"mlx-lm's ring of {count}"] = await _subject(stack, ring(model, count))
        yield subjects


async def _subject(
    stack: contextlib.AsyncExitStack,
    opened: "contextlib.AbstractAsyncContextManager[Baseline]",
) -> Subject:
    baseline = await stack.enter_async_context(opened)
    if baseline.refused:
        raise SystemExit(baseline.refused)
    return of_ask(baseline.ask)
