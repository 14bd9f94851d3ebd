"""`unicluster join`: runs the machine's agent until a signal ends it."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from node.agent.agent import Agent, how_to_get_mlx
from node.agent.devices import Device
from node.agent.peers import Peers
from node.agent.probe import Hardware, probe
from node.agent.telemetry import publish
from node.power.following import followed
from node.prefixes.folder import default_directory
from node.weights.store import offered
from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__
from unicluster.access.token_input import JOIN_VARIABLE, join_token_options, read_join_token
from unicluster.checkpoints.weights_service import WeightsService
from unicluster.cluster.background import going_on
from unicluster.cluster.channels import bind, check_free, make_server
from unicluster.cluster.descriptors import raise_file_limit
from unicluster.cluster.discovery import Advertisement, Advertisements, Browser, one_address
from unicluster.cluster.here import DEFAULT_PORTS, noted
from unicluster.cluster.known_machines import peer_option
from unicluster.cluster.records import Kind
from unicluster.cluster.versions import mismatch
from unicluster.command_line import Command, Option
from unicluster.dialing.dialer import Dialer
from unicluster.dialing.greetings import greeting_of
from unicluster.errors import InputError
from unicluster.system.systemd import notify
from unicluster.telemetry.broker_url import BrokerUrl, chosen_broker, mqtt_option
from unicluster.telemetry.mqtt import Publisher, in_background
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import check_name, default_name
from unicluster.trust.keyring import Keyring, Membership
from unicluster.trust.machine_key import MachineKey, held_machine_key
from unicluster.trust.role import audit
from unicluster.trust.store import Store
from unicluster.units import format_bytes, format_rate, parse_bytes
from unicluster.v1.node_pb2 import Greeting
from unicluster.v1.node_pb2_grpc import add_NodeServicer_to_server
from unicluster.v1.weights_pb2_grpc import add_WeightsServicer_to_server

log = logging.getLogger(__name__)

DEFAULT_PORT = DEFAULT_PORTS[Kind.NODE]
ADVERTISE_SECONDS = 5.0
# A change of free memory smaller than this part of it is not worth a multicast.
NOTICEABLE = 0.02
_PACKAGES = {"mlx": "mlx_lm", "ggml": "llama_cpp"}


@dataclass(frozen=True)
class JoinOptions:
    """The command line of `unicluster join`."""

    name: str
    memory: str | None
    host: str
    port: int
    peer: tuple[str, ...]
    engine: str
    device: tuple[str, ...]
    cache_dir: str
    no_spare: bool
    let_sleep: bool
    token: str | None
    token_file: str | None
    replace: bool
    mqtt: str | None
    quiet: bool


def run(**options: Any) -> int:
    args = JoinOptions(**options)
    check_name(args.name)
    cap = parse_bytes(args.memory) if args.memory is not None else None
    if cap is not None and cap <= 0:
        raise InputError(f"--memory {args.memory}: must be more than nothing")
    if not 0 <= args.port <= 65534:
        raise InputError(f"--port {args.port}: between 0 and 65534")
    token = read_join_token(args.token, args.token_file)
    args = replace(args, cache_dir=os.path.abspath(args.cache_dir or default_directory()))
    if args.replace and token is None:
        raise InputError("--replace: needs --token")
    if args.engine != "auto" and importlib.util.find_spec(_PACKAGES[args.engine]) is None:
        raise _not_installed(args.engine)
    if not args.quiet:
        logging.getLogger().setLevel(min(logging.INFO, logging.getLogger().level))
    broker = chosen_broker(args.mqtt)
    # Before a cluster is made whose token would never be printed.
    check_free(args.host, args.port)
    hardware = _offering(probe(cap), args.engine, args.device)
    store = Store()
    if token is not None:
        cluster, created = store.join(token, replace=args.replace), False
    else:
        cluster, created = store.load_or_create()
    return asyncio.run(_join(args, cap, hardware, cluster, created, broker))


async def _join(
    args: JoinOptions,
    cap: int | None,
    hardware: Hardware,
    cluster: Cluster,
    created: bool,
    broker: BrokerUrl | None,
) -> int:
    with held_machine_key(args.name) as machine_key:
        return await _run_agent(args, cap, hardware, cluster, created, broker, machine_key)


async def _run_agent(
    args: JoinOptions,
    cap: int | None,
    hardware: Hardware,
    cluster: Cluster,
    created: bool,
    broker: BrokerUrl | None,
    machine_key: MachineKey,
) -> int:
    membership = Membership(cluster, Store())
    identity = Keyring.of_member(membership, args.name, machine_key.key)
    raise_file_limit()
    server = make_server()
    port = bind(server, args.host, args.port, identity)
    browser = Browser(Kind.NODE, lambda: membership.fingerprints, host=args.host)
    peers = Peers(args.peer, browser)
    agent = Agent(
        identity,
        hardware,
        peers,
        host=args.host,
        port=port,
        stage_port=port + 1 if args.port else 0,
        memory_cap=cap,
        cache_dir=args.cache_dir,
        spare=not args.no_spare and hardware.backend != "none",
    )
    add_NodeServicer_to_server(agent, server)
    add_WeightsServicer_to_server(WeightsService(offered, agent.in_flight), server)
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    machine_key.serving_at(agent.addresses()[0])

    dialer = Dialer(identity)

    def greeting() -> Greeting:
        return greeting_of(
            *(port, one_address(args.host), agent.addresses()),
            *(__version__, PROTOCOL, OLDEST_PROTOCOL),
        )

    try:
        usable = await asyncio.to_thread(agent.usable_memory)
        advertised = Advertisements(
            lambda: membership.fingerprints,
            lambda fingerprint: Advertisement(
                Kind.NODE,
                args.name,
                port,
                fingerprint,
                host=args.host,
                who_has=dialer.another_of,
                memory=str(hardware.total_memory),
                usable=str(usable),
                chip=hardware.chip,
                backend=hardware.backend,
            ),
        )
        async with (
            peers.greeted(identity, greeting),
            browser,
            advertised as advertisement,
            contextlib.AsyncExitStack() as stack,
        ):
            stack.enter_context(noted(Kind.NODE, one_address(args.host), port))
            audit.info("joined cluster %s as %s, port %d", cluster.fingerprint, args.name, port)
            _print_greeting(args, agent, usable, port, cluster, created)
            if broker is not None:
                publisher = Publisher(broker, cluster, f"node/{args.name}")
                await stack.enter_async_context(publisher.running())
                await stack.enter_async_context(in_background(publish(agent, publisher, args.name)))
            awake = (lambda: False) if args.let_sleep else (lambda: agent.keeps_awake)
            await stack.enter_async_context(followed(agent.sleeps, awake))
            agent.prepare()
            notify(f"READY=1\nSTATUS={args.name} in cluster {cluster.fingerprint}, port {port}")
            await _keep_current(advertisement, agent, usable, stop, browser)
            notify("STOPPING=1")
    finally:
        await server.stop(grace=0.5)
        await agent.close()
    print(f"{args.name} has left the cluster.", flush=True)
    return 0


def _offering(hardware: Hardware, engine: str, devices: Sequence[str]) -> Hardware:
    """The machine with one of its engines, or with all (auto), on some of its devices, or all."""
    if engine != "auto" and engine not in hardware.engines:
        raise _not_installed(engine)
    return hardware.offering(engine, devices)


def _not_installed(engine: str) -> InputError:
    ggml = "pip install 'unicluster[ggml]', then join again"
    how = how_to_get_mlx() if engine == "mlx" else ggml
    return InputError(f"--engine {engine}: it is not installed on this machine: {how}")


async def _keep_current(
    advertisement: Advertisements,
    agent: Agent,
    advertised: int,
    stop: asyncio.Event,
    browser: Browser,
) -> None:
    """Updates the advertisement when usable memory changes, until `stop`.

    Also warns once of each machine that is too old or too new. advertised: bytes.
    """
    warned: set[str] = set()
    while not stop.is_set():
        for machine in browser.found.values():
            wrong = mismatch(
                f"machine {machine.name}", machine.version, machine.protocol, machine.oldest
            )
            if wrong and wrong not in warned:
                warned.add(wrong)
                log.warning("%s", wrong)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), ADVERTISE_SECONDS)
        with going_on("measuring this machine"):
            await asyncio.to_thread(agent.measure_if_quiet)
        with going_on("advertising this machine"):
            usable = await asyncio.to_thread(agent.usable_memory)
            if abs(usable - advertised) > NOTICEABLE * max(advertised, 1):
                advertised = usable
                await advertisement.update(usable=str(usable))


def _print_greeting(
    args: JoinOptions, agent: Agent, usable: int, port: int, cluster: Cluster, created: bool
) -> None:
    hardware = agent.hardware
    kind = "measured" if hardware.bandwidth_measured else "known"
    print(
        f"{args.name} is in cluster {cluster.fingerprint}: {hardware.chip}, {hardware.backend}, "
        f"{format_bytes(usable)} of {format_bytes(hardware.total_memory)} to offer, "
        f"{format_rate(hardware.bandwidth)} ({kind}), port {port}."
    )
    if args.engine != "auto":
        print(f"It offers {args.engine} only.")
    elif "ggml" in hardware.engines:
        print(f"It also has ggml (llama.cpp, {hardware.ggml_backend}), for GGUFs.")
    for line in device_lines(agent.offers()):
        print(line)
    if hardware.backend == "none":
        print(f"MLX is not installed, so this machine can't compute stages: {how_to_get_mlx()}.")
    if created:
        print("\nA new cluster. On each of the other machines, run:\n")
        print(f"  {JOIN_VARIABLE}={cluster.token} unicluster join\n")
        print("Whoever has this token is a member. `unicluster token show` prints it again.")
    print("Ctrl-C leaves the cluster.", flush=True)


def device_lines(offers: Sequence[tuple[Device, int]]) -> list[str]:
    """A line for each device; none where all engines have the host's memory alike."""
    if all(device.kind == "cpu" for device, _ in offers):
        return []
    return [
        f"  {device.engine} on {device.name} ({device.description}): {format_bytes(usable)} of "
        f"{format_bytes(device.total)}, {format_rate(device.bandwidth)}"
        for device, usable in offers
    ]


command = Command(
    run,
    sections={
        "Cluster": [
            *join_token_options(),
            Option("--replace", "with a token: leave the cluster joined before", is_flag=True),
            Option("--name", "default: the host's name", default=default_name),
        ],
        "What it offers": [
            Option(
                "--memory",
                "offer at most this much (default: all that is usable)",
                metavar="96GB",
            ),
            Option(
                "--engine",
                "offer only this engine (default: all that are installed; ggml is for GGUFs)",
                type=click.Choice(("auto", *_PACKAGES)),
                default="auto",
            ),
            Option(
                "--device",
                "compute on this device only, such as CUDA0 or Vulkan1; several: on all of them "
                "(default: all GPUs, or the CPU)",
                multiple=True,
                metavar="NAME",
            ),
            Option(
                "--cache-dir",
                "directory on a fast disk for the prompt caches of `serve --cache-disk` "
                "(default: ~/.cache/unicluster)",
                metavar="DIR",
                default="",
            ),
            Option(
                "--no-spare",
                "keep no worker ready that takes the place of a lost one seconds sooner, for some "
                "70 MB of memory",
                is_flag=True,
            ),
            Option(
                "--let-sleep",
                "let this machine fall asleep when nobody uses it, also while a model is served "
                "from it (default: it stays awake then)",
                is_flag=True,
            ),
        ],
        "Network": [
            Option("--host", "address to listen at (default: all)", default=""),
            Option(
                "--port",
                "the agent's port; its stage worker takes the next one "
                f"(default: {DEFAULT_PORT}; 0: any free ones)",
                type=int,
                default=DEFAULT_PORT,
            ),
            peer_option("an agent that multicast does not reach, to be made known to it"),
        ],
        "Telemetry": [
            mqtt_option(),
            Option("--quiet", "log only what goes wrong, not each stage", is_flag=True),
        ],
    },
    examples=[
        "unicluster join",
        "unicluster join --token-file uc1.txt --memory 400GB",
        "unicluster join --engine ggml --device CUDA0 --device CUDA1",
        "unicluster join --peer studio.local:47600",
    ],
    environment="UNICLUSTER_JOIN",
)
