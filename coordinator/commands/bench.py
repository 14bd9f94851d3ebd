"""`unicluster bench`: how fast what is served is, or a model cut in pieces on this machine."""

import argparse
import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from coordinator.commands.baselines import baselines
from coordinator.commands.serve import served
from coordinator.fleet import local
from coordinator.models.catalog import resolve
from coordinator.planning.planner import Layout, least_memory
from coordinator.serving.events import Events
from coordinator.serving.options import ServeOptions
from coordinator.terminal.printer import printing
from unicluster.benchmark import bench
from unicluster.benchmark.measure import Ask
from unicluster.client.client import AsyncClient
from unicluster.errors import InputError, UniclusterError
from unicluster.v1.node_pb2 import InspectRequest


@dataclass(frozen=True)
class _Subject:
    """What is measured, and what with."""

    client: AsyncClient
    others: dict[str, Ask] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="with --local: a directory, or demo (default)"
    )
    parser.add_argument(
        "--local",
        type=int,
        metavar="N",
        help="cut MODEL over N agents on this machine, and compare with mlx-lm alone",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="default: whichever is found")
    parser.add_argument(
        "--users", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (3)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--prompt", type=int, default=512, help="to prefill (default: 512)")
    parser.add_argument("--only", nargs="+", choices=bench.MEASURES, default=list(bench.MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def run(args: argparse.Namespace) -> int:
    if args.local is None and args.model is not None:
        raise InputError(f"bench {args.model}: give --local N to cut it on this machine")
    if args.local is not None and args.server is not None:
        raise InputError("give either --local or --server")
    for name, least in (("local", 1), ("rounds", 1), ("tokens", 2), ("prompt", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: at least {least}")
    if min(args.users) < 1:
        raise InputError(f"--users {min(args.users)}: at least 1")
    return asyncio.run(_bench(args))


async def _bench(args: argparse.Namespace) -> int:
    main = asyncio.current_task()
    if main is not None:  # else the agents of --local would stay
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    console, progress = Console(), Console(stderr=True)
    sizes = bench.Sizes(decode=args.tokens, prefill=args.prompt, users=tuple(args.users))
    opened = _deployment(args) if args.local is None else _cut_here(args, progress)
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
async def _deployment(args: argparse.Namespace) -> AsyncIterator[_Subject]:
    async with AsyncClient(args.server) as client:
        yield _Subject(client)


@contextlib.asynccontextmanager
async def _cut_here(args: argparse.Namespace, console: Console) -> AsyncIterator[_Subject]:
    """A cluster of its own for as long as the block runs: nothing of the real one is touched."""
    source = resolve(args.model or "demo")
    if source.model != "demo" and not Path(source.model).is_absolute():
        raise InputError(f"bench --local {args.local} {args.model}: give a directory, or demo")
    users = max(2, *args.users)
    events = Events()
    with local.own_cluster() as cluster, printing(events, stderr=True) as printer:
        with console.status(f"Looking into {source.display}"):
            request = InspectRequest(model=source.model, users=users)
            layout = Layout.from_proto(await local.inspect(request))
        memory = least_memory(layout, args.local)
        names = [f"stage-{number}" for number in range(args.local)]
        options = ServeOptions(source, users=users, nodes=names, host=local.HOST, port=0)
        async with (
            local.agents(names, memory),
            served(options, cluster, events) as running,
            baselines(source.model, args.local) as (others, remarks),
            AsyncClient(running.address, cluster=cluster) as client,
        ):
            await printer.caught_up()
            yield _Subject(client, others, remarks)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"--json {path}: {error.strerror}") from error
