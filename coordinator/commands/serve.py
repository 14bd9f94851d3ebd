"""`unicluster serve MODEL`: plan, load, and serve until a signal."""

import asyncio
import contextlib
import math
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import grpc

from coordinator.commands.lasting import Lasting, lasting
from coordinator.fleet.members import Members
from coordinator.models.catalog import QUANTS, model_names
from coordinator.models.offer import Offered, offer
from coordinator.planning.placement import Objective
from coordinator.recovery.survey import MARGIN
from coordinator.serving.chat_door import ChatDoor, ControlDoor
from coordinator.serving.engine_options import chosen_models, engine_options
from coordinator.serving.events import (
    Events,
    HttpAddress,
    Inspected,
    Inspecting,
    Leaving,
    Listening,
    MachinesFound,
    Searching,
    Unloading,
)
from coordinator.serving.gateway import Gateway
from coordinator.serving.generation_options import generation_options, take_generation
from coordinator.serving.inspected import inspected
from coordinator.serving.options import (
    DEFAULT_HTTP_PORT,
    DEFAULT_PORT,
    RECOVER_SECONDS,
    SETTLE_SECONDS,
    HttpOptions,
    Rebalancing,
    ServeOptions,
    objective_option,
)
from coordinator.serving.service import Service
from coordinator.serving.telemetry import publish_telemetry, root_of
from coordinator.terminal.event_log import EventLogger
from coordinator.terminal.printer import printing
from unicluster.cluster.channels import bind, join_address, make_server
from unicluster.cluster.descriptors import raise_file_limit
from unicluster.cluster.discovery import Advertisement, Advertisements, one_address
from unicluster.cluster.here import noted
from unicluster.cluster.known_machines import nodes_option, peer_option
from unicluster.cluster.records import Kind
from unicluster.cluster.sizes import CHAT_BYTES
from unicluster.command_line import Argument, Command, Option, beginning
from unicluster.errors import InputError
from unicluster.system.stopping import why_it_comes_back
from unicluster.system.systemd import notify
from unicluster.telemetry.broker_url import chosen_broker, mqtt_option
from unicluster.telemetry.mqtt import Publisher, in_background
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Credentials, default_name
from unicluster.trust.keyring import Keyring, Membership
from unicluster.trust.store import Store
from unicluster.v1.chat_pb2_grpc import add_ChatServicer_to_server
from unicluster.v1.control_pb2_grpc import add_ControlServicer_to_server
from unicluster.v1.node_pb2 import StageSpec

# As long as agents allow.
MOST_GRACE_SECONDS = 3600.0


def run(
    model: str,
    quant: str | None,
    context: int,
    users: int,
    gguf: str | None,
    engine: str,
    objective: Objective,
    nodes: str | None,
    peer: tuple[str, ...],
    host: str,
    grpc_port: int,
    http_port: int,
    no_http: bool,
    http_cert: Path | None,
    http_plain: bool,
    http_name: tuple[str, ...],
    http_origin: tuple[str, ...],
    recover: float,
    rebalance: str,
    rebalance_after: float,
    metrics_port: int | None,
    mqtt: str | None,
    orphan_grace: float,
    service: str | None,
    **generation: Any,
) -> int:
    if context < 0 or context == 1:
        raise InputError(f"--context {context}: at least 2 tokens")
    if users < 1:
        raise InputError(f"--users {users}: at least 1")
    if not 0 <= grpc_port <= 65535:
        raise InputError(f"--grpc-port {grpc_port}: between 0 and 65535")
    if not 0 <= http_port <= 65535:
        raise InputError(f"--http-port {http_port}: between 0 and 65535")
    if metrics_port is not None and not 0 <= metrics_port <= 65535:
        raise InputError(f"--metrics-port {metrics_port}: between 0 and 65535")
    if not 0 <= orphan_grace <= MOST_GRACE_SECONDS:
        raise InputError(
            f"--orphan-grace {orphan_grace:g}: between 0 and {MOST_GRACE_SECONDS:g} seconds"
        )
    if not 0 <= recover < math.inf:
        raise InputError(f"--recover {recover:g}: a number of seconds, 0 or more")
    if not 0 <= rebalance_after < math.inf:
        raise InputError(f"--rebalance-after {rebalance_after:g}: a number of seconds, 0 or more")
    rebalancing = Rebalancing(_margin(rebalance), rebalance_after)
    if service is not None and not (service.strip() and service.isprintable()):
        raise InputError("--service: a name of printable characters")
    names = [name.strip() for name in nodes.split(",")] if nodes is not None else None
    if names is not None and not all(names):
        raise InputError(f"--nodes {nodes}: names no machine; write it like ann,bob")
    spec = take_generation(generation)
    source, as_gguf = chosen_models(model, quant, gguf, engine, spec.kv_bits)
    options = ServeOptions(
        source=source,
        gguf=as_gguf,
        context=context,
        users=users,
        objective=objective,
        generation=spec,
        nodes=names,
        peers=peer,
        host=host,
        port=grpc_port,
        broker=chosen_broker(mqtt),
        metrics_port=metrics_port,
        service=service or source.display,
        orphan_grace_s=orphan_grace,
        recover_s=recover,
        rebalancing=rebalancing,
        http=None
        if no_http
        else HttpOptions(http_port, http_cert, http_plain, http_name, http_origin),
    )
    events = Events()
    logged = events.followed(EventLogger(options.service), "the event log")
    with printing(events), logged:
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
        events.publish(
            Listening(options.source.display, running.address, running.metrics, running.http)
        )
        ended = asyncio.create_task(running.wait())
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        ended.cancel()
        notify("STOPPING=1")
        if options.orphan_grace_s and (why := await asyncio.to_thread(why_it_comes_back)):
            running.leave_stages()
            events.publish(Leaving(options.source.display, options.orphan_grace_s, why))
        else:
            events.publish(Unloading(options.source.display))
    return 0


class Running:
    """A model that is being served, at `address`.

    `metrics` and `http` are the addresses of those, where they were asked for.
    """

    def __init__(
        self,
        service: Service,
        address: str,
        metrics: str | None,
        http: HttpAddress | None,
        task: asyncio.Task[None],
        lasts: Lasting | None = None,
    ) -> None:
        self.service = service
        self.address = address
        self.metrics = metrics
        self.http = http
        self._task = task
        self._lasts = lasts

    def leave_stages(self) -> None:
        """Leaves the stages standing: this command begins anew soon, and takes them up."""
        self.service.leave_stages()
        if self._lasts is not None:
            self._lasts.comes_back = True

    async def wait(self) -> None:
        """Returns never, or raises what ended the service, which goes on if this is cancelled."""
        # Else the service would be cancelled twice, the second time while it ends in good order.
        await asyncio.shield(self._task)


@contextlib.asynccontextmanager
async def served(options: ServeOptions, cluster: Cluster, events: Events) -> AsyncIterator[Running]:
    """Everything `serve` does, until the block is left: then all is unloaded.

    Progress is published to `events`. The port is taken first, so that a taken one is reported
    before anything loads.
    """
    async with lasting(options) as lasts, _served(options, cluster, events, lasts) as running:
        yield running


@contextlib.asynccontextmanager
async def _served(
    options: ServeOptions, cluster: Cluster, events: Events, lasts: Lasting | None
) -> AsyncIterator[Running]:
    membership = Membership(cluster, Store())
    identity = Keyring.of_member(membership, default_name())
    raise_file_limit()
    server = make_server(most_bytes=CHAT_BYTES)
    port = bind(
        *(server, options.host, options.port, identity),
        admitted=membership.clients_ca_pem,
        flag="--grpc-port",
    )
    if lasts is not None:
        lasts.claim.at(_where(options, port))
    gateway = Gateway(options.source.display, options.recover_s)
    door = ChatDoor(gateway)
    add_ChatServicer_to_server(door, server)
    add_ControlServicer_to_server(ControlDoor(gateway), server)
    named = (options.source, options.gguf)
    models = [source.model for source in named if source is not None]
    if options.generation.HasField("draft"):
        models.append(options.generation.draft.model)
    offered = await asyncio.to_thread(offer, models, port, server)
    async with (
        _started(server),
        contextlib.aclosing(door),
        _http(options, gateway, membership) as http,
        _measured(options, membership, gateway) as metrics,
        Members(
            *(membership, identity, options.peers, options.host, options.service),
            lasts.drains if lasts is not None else None,
        ) as members,
        contextlib.AsyncExitStack() as stack,
    ):
        where = _where(options, port)
        service = await _inspected(options, members, identity, events, offered, lasts, where)
        gateway.service = service
        if options.broker is not None:
            publisher = Publisher(options.broker, cluster, root_of(options.source.display))
            publishing = publish_telemetry(gateway, service, members, publisher, default_name())
            await stack.enter_async_context(publisher.running())
            await stack.enter_async_context(in_background(publishing))
        task = asyncio.create_task(service.run())
        try:
            ready = asyncio.create_task(service.until_ready())
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if task.done():
                task.result()
            name = f"{default_name()[:35]}-{secrets.token_hex(4)}"
            advertisements = Advertisements(
                lambda: membership.fingerprints,
                lambda fingerprint: Advertisement(
                    *(Kind.CHAT, name, port, fingerprint),
                    host=options.host,
                    model=options.source.display,
                ),
            )
            where = one_address(options.host)
            async with advertisements:
                stack.enter_context(noted(Kind.CHAT, where, port))
                address = join_address(options.host or "127.0.0.1", port)
                yield Running(service, address, metrics, http, task, lasts)
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
    options: ServeOptions, membership: Membership, gateway: Gateway
) -> AsyncIterator[str | None]:
    """Metrics for Prometheus while the block runs, if asked for: at which address."""
    if options.metrics_port is None:
        yield None
        return
    # Here, because most don't ask for them.
    from coordinator.serving.metrics_port import PATH, metrics_port

    async with metrics_port(
        membership, options.host, options.metrics_port, gateway.measure
    ) as port:
        yield f"https://{join_address(options.host or '127.0.0.1', port)}{PATH}"


@contextlib.asynccontextmanager
async def _http(
    options: ServeOptions, gateway: Gateway, membership: Membership
) -> AsyncIterator[HttpAddress | None]:
    """The HTTP door while the block runs, if asked for: at which address."""
    if options.http is None:
        yield None
        return
    # Here, because not all ask for it.
    from coordinator.api.app import make_app
    from coordinator.api.certificate import CLUSTER, ClusterTls, names_here, tls_of
    from coordinator.api.doorman import Doorman
    from coordinator.api.server import LOOPBACK, listen, serving
    from coordinator.state.database import Database
    from coordinator.state.keys import Keys

    door = options.http
    names = names_here(door.names)
    tls = None
    if door.certificate == CLUSTER:
        tls = ClusterTls(membership, names).context
    elif door.certificate is not None:
        tls = tls_of(door.certificate)
    with contextlib.closing(Database()) as database:
        keys = Keys(database)
        has_keys = keys.any()
        is_private = not has_keys or (tls is None and not door.plain)
        listener = listen(LOOPBACK if is_private else options.host, door.port)
        port = listener.getsockname()[1]
        doorman = Doorman(keys, is_open=is_private)
        app = make_app(gateway, doorman, names, door.origins)
        async with serving(app, listener, tls):
            host = LOOPBACK if is_private else options.host or LOOPBACK
            url = f"{'http' if tls is None else 'https'}://{join_address(host, port)}"
            yield HttpAddress(url, with_key=has_keys, is_private=is_private)


async def _inspected(
    options: ServeOptions,
    members: Members,
    identity: Credentials,
    events: Events,
    offered: Offered,
    lasts: Lasting | None,
    where: str,
) -> Service:
    """The service of a model whose sizes are known, over the machines that answer."""
    source, gguf = options.source, options.gguf
    events.publish(Searching())
    resumed = await lasts.resume(members, offered) if lasts is not None else None
    if resumed is not None:
        inspection, cut = resumed
        events.publish(MachinesFound(tuple(await members.machines())))
    else:
        await members.search(options.nodes)
        machines = await members.machines()
        events.publish(MachinesFound(tuple(machines)))
        if lasts is not None:
            await lasts.until_free(members)
        sources = [*offered.sources, *(machine.address for machine in machines)]
        events.publish(Inspecting(source.display))
        inspection, cut = await inspected(options, members, offered.revisions, sources), None
    events.publish(Inspected(source.display, inspection.variants))
    template = StageSpec(
        service=options.service, orphan_grace_s=options.orphan_grace_s, coordinator=where
    )
    template.MergeFrom(options.generation)
    return Service(
        source,
        gguf,
        inspection,
        offered.sources,
        members,
        identity,
        options.objective,
        options.nodes,
        events,
        template,
        cut,
        lasts.last if lasts is not None else None,
        options.rebalancing,
        (lambda plan: lasts.keep(inspection, plan)) if lasts is not None else lambda plan: None,
    )


def _margin(text: str) -> float | None:
    """The part of 1 that `--rebalance` states in percent; None for off."""
    if text == "off":
        return None
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 1 <= percent < 100:
        raise InputError(f"--rebalance {text}: a percentage from 1 to 99, or off")
    return percent / 100


def _where(options: ServeOptions, port: int) -> str:
    """Who serves it and where, for people at other machines."""
    return f"{default_name()} ({join_address(options.host or default_name(), port)})"


command = Command(
    run,
    arguments=[
        Argument(
            "model",
            "a directory, owner/name on the hub, a known name, or demo",
            complete=model_names,
        )
    ],
    sections={
        "Model": [
            Option(
                "--quant",
                f"quantize: {', '.join(QUANTS)} (default: as stored); of a repository of GGUFs "
                "which of them: q4_k_m, iq2_xxs, ud-q2_k_xl, ...",
                metavar="QUANT",
                complete=beginning(lambda: QUANTS),
            ),
            Option(
                "--context",
                "prompt and answer together, for each user "
                "(default: the model's own, at most 8192)",
                type=int,
                default=0,
                metavar="TOKENS",
            ),
            Option("--users", "answers at the same time (default: 1)", type=int, default=1),
            *engine_options(),
        ],
        "Generation": generation_options(),
        "Machines": [
            nodes_option("only these machines (default: all)"),
            peer_option("an agent that multicast does not reach"),
            objective_option(),
            Option(
                "--service",
                "a name for what is served, to serve a model twice in one cluster "
                "(default: the model's)",
                metavar="NAME",
            ),
            Option(
                "--orphan-grace",
                "how long machines keep their layers when this command is lost, for the next one "
                "to adopt (default: 120; 0: not at all)",
                type=float,
                default=120.0,
                metavar="SECONDS",
            ),
            Option(
                "--recover",
                "how long answers that a lost machine breaks off may wait to go on "
                f"(default: {RECOVER_SECONDS:g}; 0: they end)",
                type=float,
                default=RECOVER_SECONDS,
                metavar="SECONDS",
            ),
            Option(
                "--rebalance",
                "move layers to machines that have come where that saves so much of a token's "
                f"time (default: {MARGIN * 100:g}; off: only by `unicluster rebalance`)",
                default=f"{MARGIN * 100:g}",
                metavar="PERCENT",
            ),
            Option(
                "--rebalance-after",
                f"when it would have for so long (default: {SETTLE_SECONDS:g})",
                type=float,
                default=SETTLE_SECONDS,
                metavar="SECONDS",
            ),
        ],
        "Network": [
            Option("--host", "address to listen at (default: all)", default=""),
            Option(
                "--grpc-port",
                f"port for chat clients (default: {DEFAULT_PORT}; 0: any free one)",
                type=int,
                default=DEFAULT_PORT,
                metavar="PORT",
            ),
        ],
        "HTTP": [
            Option(
                "--http-port",
                f"port for OpenAI's API (default: {DEFAULT_HTTP_PORT}; 0: any free one)",
                type=int,
                default=DEFAULT_HTTP_PORT,
                metavar="PORT",
            ),
            Option(
                "--http-cert",
                "TLS, for other machines too, with a key of `unicluster key`: a PEM file with "
                "certificate and key, or cluster, for one of the cluster's own authority",
                type=click.Path(path_type=Path),
                metavar="FILE",
            ),
            Option(
                "--http-plain",
                "other machines may ask without TLS: behind a proxy that has it",
                is_flag=True,
            ),
            Option("--no-http", "no HTTP at all", is_flag=True),
            Option(
                "--http-name",
                "a name of this machine that clients use, besides its address and localhost",
                multiple=True,
                metavar="NAME",
            ),
            Option(
                "--http-origin",
                "a page whose scripts may ask, as in https://chat.example (default: none)",
                multiple=True,
                metavar="ORIGIN",
            ),
        ],
        "Telemetry": [
            mqtt_option(),
            Option(
                "--metrics-port",
                "port for Prometheus, with a certificate of `unicluster token cert` "
                "(default: none)",
                type=int,
                metavar="PORT",
            ),
        ],
    },
    examples=[
        "unicluster serve deepseek-r1 --quant q4",
        "unicluster serve ./llama --users 8 --objective throughput",
        "unicluster serve demo --nodes ann,bob --lookup",
    ],
    environment="UNICLUSTER_SERVE",
)
