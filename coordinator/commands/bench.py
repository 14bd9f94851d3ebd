"""`unicluster bench`: how fast what is served is, or a model cut in pieces on this machine."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from coordinator.commands.baselines import baselines
from coordinator.commands.serve import served
from coordinator.fleet import local
from coordinator.models.catalog import model_names, resolve
from coordinator.planning.planner import least_memory
from coordinator.serving.events import Events
from coordinator.serving.generation_options import generation_options, take_generation
from coordinator.serving.inspected import inspected_here
from coordinator.serving.options import ServeOptions
from coordinator.terminal.printer import printing
from unicluster.benchmark import bench
from unicluster.benchmark.measure import Ask
from unicluster.client.client import AsyncClient
from unicluster.command_line import Argument, Command, Option, on_command_line, server_option
from unicluster.errors import InputError, UniclusterError
from unicluster.terminal.console import Console
from unicluster.v1.node_pb2 import StageSpec


@dataclass(frozen=True)
class _Subject:
    """The deployment that is measured, and the baselines beside it."""

    client: AsyncClient
    others: dict[str, Ask] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BenchOptions:
    """The command line of `unicluster bench`."""

    model: str | None
    local: int | None
    server: str | None
    users: tuple[int, ...]
    rounds: int
    tokens: int
    prompt: int
    only: tuple[str, ...]
    json: Path | None
    generation: StageSpec


def run(**options: Any) -> int:
    stated = any(on_command_line(str(option.name)) for option in generation_options())
    generation = take_generation(options)
    args = BenchOptions(**options, generation=generation)
    if args.local is None and args.model is not None:
        raise InputError(f"bench {args.model}: give --local N to cut it on this machine")
    if args.local is None and stated:
        raise InputError("generation options need --local N: a deployment has its own")
    if args.local is not None and on_command_line("server"):
        raise InputError("give either --local or --server")
    for name, least in (("local", 1), ("rounds", 1), ("tokens", 2), ("prompt", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: at least {least}")
    if min(args.users) < 1:
        raise InputError(f"--users {min(args.users)}: at least 1")
    return asyncio.run(_bench(args))


async def _bench(args: BenchOptions) -> int:
    main = asyncio.current_task()
    if main is not None:  # else the agents of --local would stay
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    console, progress = Console(), Console(stderr=True)
    sizes = bench.Sizes(decode=args.tokens, prefill=args.prompt, users=tuple(args.users))
    opened = _deployment(args) if args.local is None else _cut_here(args, args.local, progress)
    async with opened as subject:
        info = await subject.client.describe()
        if info.state != "ready":
            raise UniclusterError(f"{info.model} is {info.state}: {info.detail}")
        measuring = bench.Bench(subject.client, info, sizes, subject.others)
        with progress.status("Warming up") as status:
            await measuring.warm_up()
            for number in range(args.rounds):
                status.update(f"Round {number + 1} of {args.rounds}")
                await measuring.measure(args.only)
    console.print(bench.table(measuring))
    for remark in subject.remarks:
        console.print(f"[dim]Not compared: {remark}[/dim]")
    if args.json is not None:
        _write(args.json, json.dumps(measuring.as_json(), indent=2) + "\n")
    return 0


@contextlib.asynccontextmanager
async def _deployment(args: BenchOptions) -> AsyncIterator[_Subject]:
    async with AsyncClient(args.server) as client:
        yield _Subject(client)


@contextlib.asynccontextmanager
async def _cut_here(args: BenchOptions, count: int, console: Console) -> AsyncIterator[_Subject]:
    """A cluster of its own for as long as the block runs: nothing of the real one is touched."""
    source = resolve(args.model or "demo")
    if source.model != "demo" and not Path(source.model).is_absolute():
        raise InputError(f"bench --local {count} {args.model}: give a directory, a GGUF, or demo")
    users = max(2, *args.users)
    events = Events()
    with local.own_cluster() as cluster, printing(events, stderr=True) as printer:
        with console.status(f"Inspecting {source.display}"):
            layout = await inspected_here(source, args.generation, users=users)
        memory = least_memory(layout, count)
        names = [f"stage-{number}" for number in range(count)]
        options = ServeOptions(
            source, users=users, generation=args.generation, nodes=names, host=local.HOST, port=0
        )
        async with (
            local.agents(names, memory),
            served(options, cluster, events) as running,
            baselines(source.model, count) as (others, remarks),
            AsyncClient(running.address, cluster=cluster) as client,
        ):
            await printer.caught_up()
            yield _Subject(client, others, remarks)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"--json {path}: {error.strerror}") from error


command = Command(
    run,
    arguments=[
        Argument(
            "model",
            "with --local: a directory, a GGUF, or demo (default)",
            required=False,
            complete=model_names,
        )
    ],
    sections={
        "What is measured": [
            server_option("default: whichever is found"),
            Option(
                "--local",
                "cut MODEL over N agents here, and compare with mlx-lm or llama.cpp alone",
                type=int,
                metavar="N",
            ),
            Option(
                "--only",
                "default: all",
                many=True,
                type=click.Choice(bench.MEASURES),
                default=bench.MEASURES,
            ),
        ],
        "How much": [
            Option("--users", "default: 2 4", many=True, type=int, default=(2, 4), metavar="N..."),
            Option("--rounds", "of which medians are taken (3)", type=int, default=3),
            Option("--tokens", "of an answer (default: 64)", type=int, default=64),
            Option("--prompt", "to prefill (default: 512)", type=int, default=512),
        ],
        "Generation, with --local": generation_options(),
        "Results": [
            Option(
                "--json", "write all figures there", metavar="FILE", type=click.Path(path_type=Path)
            )
        ],
    },
    examples=[
        "unicluster bench",
        "unicluster bench --local 3 --users 2 4 8",
        "unicluster bench --local 2 ~/models/llama --lookup --only decode",
    ],
)
