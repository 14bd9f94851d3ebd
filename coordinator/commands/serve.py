"""`unicluster serve MODEL`: plan, load, and serve until told to end."""

import argparse
import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator
from typing import get_args

import grpc

from coordinator.fleet.members import Members
from coordinator.models.catalog import QUANTS
from coordinator.planning.placement import Objective
from coordinator.serving.engine_options import add_engine_arguments, models_of
from coordinator.serving.events import (
    Events,
    Inspected,
    Inspecting,
    Listening,
    MachinesFound,
    Searching,
    Unloading,
)
from coordinator.serving.gateway import Front
from coordinator.serving.generation_options import add_serving_arguments, serving_of
from coordinator.serving.inspected import inspected
from coordinator.serving.offer import Offered, offer
from coordinator.serving.options import DEFAULT_PORT, ServeOptions
from coordinator.serving.service import Service
from coordinator.serving.telemetry import root_of, tell
from coordinator.terminal.printer import printing
from unicluster.cluster.channels import bind, join_address, make_server
from unicluster.cluster.discovery import Advertisement, Kind
from unicluster.cluster.systemd import notify
from unicluster.cluster.trust import Cluster, Identity, Store, default_name
from unicluster.errors import InputError
from unicluster.telemetry.broker_url import add_mqtt_argument, chosen_broker
from unicluster.telemetry.mqtt import Publisher, in_background
from unicluster.v1.chat_pb2_grpc import add_ChatServicer_to_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, owner/name on the hub, a known name, or demo"
    )
    parser.add_argument(
        "--quant",
        metavar="QUANT",
        help=f"quantize: {', '.join(QUANTS)} (default: as stored); of a repository of GGUFs "
        "which of them: q4_k_m, iq2_xxs, ud-q2_k_xl, ...",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        metavar="TOKENS",
        help="prompt and answer together, for each user (default: the model's own, at most 8192)",
    )
    parser.add_argument(
        "--users", type=int, default=1, help="answers at the same time (default: 1)"
    )
    add_serving_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--objective",
        choices=get_args(Objective),
        default="latency",
        help="latency: tokens per second for one user; throughput: for all together",
    )
    parser.add_argument("--nodes", metavar="A,B", help="only these machines (default: all)")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="an agent that multicast does not reach; may be repeated",
    )
    parser.add_argument("--host", default="", help="address to listen at (default: all)")
    parser.add_argument(
        "--grpc-port",
        type=int,
        default=DEFAULT_PORT,
        metavar="PORT",
        help=f"port for chat clients (default: {DEFAULT_PORT}; 0: any free one)",
    )
    add_mqtt_argument(parser)
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="port for Prometheus, with a certificate of `unicluster token cert` (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    if args.context < 0 or args.context == 1:
        raise InputError(f"--context {args.context}: at least 2 tokens")
    if args.users < 1:
        raise InputError(f"--users {args.users}: at least 1")
    if not 0 <= args.grpc_port <= 65535:
        raise InputError(f"--grpc-port {args.grpc_port}: between 0 and 65535")
    if args.metrics_port is not None and not 0 <= args.metrics_port <= 65535:
        raise InputError(f"--metrics-port {args.metrics_port}: between 0 and 65535")
    nodes = [name.strip() for name in args.nodes.split(",")] if args.nodes is not None else None
    if nodes is not None and not all(nodes):
        raise InputError(f"--nodes {args.nodes}: names no machine; write it like ann,bob")
    serving = serving_of(args)
    source, gguf = models_of(args, serving)
    options = ServeOptions(
        source=source,
        gguf=gguf,
        context=args.context,
        users=args.users,
        objective=args.objective,
        serving=serving,
        nodes=nodes,
        peers=args.peer,
        host=args.host,
        port=args.grpc_port,
        broker=chosen_broker(args.mqtt),
        metrics_port=args.metrics_port,
    )
    events = Events()
    with printing(events):
        return asyncio.run(_serve(options, events))


async def _serve(options: ServeOptions, events: Events) -> int:
    cluster = Store().require()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(served(options, cluster, events)))
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        running = starting.result()
        notify(f"READY=1\nSTATUS={options.source.display} at {running.address}")
        events.publish(Listening(options.source.display, running.address, running.metrics))
        ended = asyncio.create_task(running.wait())
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        ended.cancel()
        notify("STOPPING=1")
        events.publish(Unloading(options.source.display))
    return 0


class Running:
    """A model that is being served, at `address`. `metrics` is the address of those, if asked."""

    def __init__(
        self, service: Service, address: str, metrics: str | None, task: asyncio.Task[None]
    ) -> None:
        self.service = service
        self.address = address
        self.metrics = metrics
        self._task = task

    async def wait(self) -> None:
        """Returns never, or raises what ended the service."""
        await self._task


@contextlib.asynccontextmanager
async def served(options: ServeOptions, cluster: Cluster, events: Events) -> AsyncIterator[Running]:
    """Everything `serve` does, until the block is left: then all is unloaded.

    `events` tell of it as it goes. The port is taken first, so that a taken one is reported
    before anything loads.
    """
    identity = cluster.issue(default_name())
    server = make_server()
    clients = cluster.client_access.authority.ca_pem
    port = bind(
        *(server, options.host, options.port, identity),
        admitted_ca_pem=clients,
        flag="--grpc-port",
    )
    front = Front(options.source.display)
    add_ChatServicer_to_server(front, server)
    named = (options.source, options.gguf, options.serving.draft)
    models = [model for model in named if model is not None]
    offered = await asyncio.to_thread(offer, [model.model for model in models], port, server)
    async with (
        _started(server),
        _measured(options, cluster, front) as metrics,
        Members(cluster, identity, options.peers, options.host) as members,
        contextlib.AsyncExitStack() as stack,
    ):
        service = await _inspected(options, members, identity, events, offered)
        front.service = service
        if options.broker is not None:
            publisher = Publisher(options.broker, cluster, root_of(options.source.display))
            telling = tell(front, service, members, publisher, default_name())
            await stack.enter_async_context(publisher.running())
            await stack.enter_async_context(in_background(telling))
        task = asyncio.create_task(service.run())
        try:
            ready = asyncio.create_task(service.until_ready())
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if task.done():
                task.result()
            advertisement = Advertisement(
                Kind.CHAT,
                f"{default_name()[:35]}-{secrets.token_hex(4)}",
                port,
                cluster.fingerprint,
                host=options.host,
                model=options.source.display,
            )
            async with advertisement:
                address = join_address(options.host or "127.0.0.1", port)
                yield Running(service, address, metrics, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def _started(server: grpc.aio.Server) -> AsyncIterator[None]:
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=0.5)


@contextlib.asynccontextmanager
async def _measured(
    options: ServeOptions, cluster: Cluster, front: Front
) -> AsyncIterator[str | None]:
    """Metrics for Prometheus while the block runs, if asked for: at which address."""
    if options.metrics_port is None:
        yield None
        return
    # Here, because most don't ask for them.
    from coordinator.serving.metrics_port import PATH, metrics_port

    async with metrics_port(cluster, options.host, options.metrics_port, front.measure) as port:
        yield f"https://{join_address(options.host or '127.0.0.1', port)}{PATH}"


async def _inspected(
    options: ServeOptions,
    members: Members,
    identity: Identity,
    events: Events,
    offered: Offered,
) -> Service:
    """The service of a model whose sizes are known, over the machines that answer."""
    events.publish(Searching())
    await members.search(options.nodes)
    machines = await members.machines()
    events.publish(MachinesFound(tuple(machines)))
    source, gguf = options.source, options.gguf
    sources = [*offered.sources, *(machine.address for machine in machines)]
    events.publish(Inspecting(source.display))
    found = await inspected(options, members, offered.revisions, sources)
    events.publish(Inspected(source.display, found.forms))
    return Service(
        source,
        gguf,
        found,
        offered.sources,
        members,
        identity,
        options.objective,
        options.nodes,
        events,
        options.serving,
    )
