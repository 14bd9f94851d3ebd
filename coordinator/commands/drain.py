"""`unicluster drain`: empties a machine's agent before it is restarted or switched off."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence

import click
import grpc

from coordinator.fleet.members import Members
from coordinator.planning.machine import Machine
from coordinator.state.database import Database
from coordinator.state.drains import Drains
from coordinator.terminal.tables import layer_range
from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.known_machines import addresses, machine_names, peer_option
from unicluster.command_line import Argument, Command, Option
from unicluster.dialing.dialer import Dialer
from unicluster.errors import (
    InputError,
    NotFoundError,
    UnavailableError,
    UniclusterError,
    shown,
)
from unicluster.trust.identity import Identity, default_name
from unicluster.trust.store import Store
from unicluster.units import format_bytes
from unicluster.v1.node_pb2 import DescribeNodeRequest, DrainRequest, NodeInfo, StageSpec
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

CALL_SECONDS = 10.0
ASK_EVERY = 0.25
DEFAULT_AGENT = "127.0.0.1:47600"


def run(
    node: str | None,
    agent: str | None,
    timeout: float,
    off: bool,
    undo: bool,
    yes: bool,
    peer: tuple[str, ...],
) -> int:
    if not timeout >= 0:
        raise InputError(f"--timeout {timeout:g}: a number of seconds, 0 or more")
    if node is not None and agent is not None:
        raise InputError(f"--agent {agent}: {shown(node)} names a machine already")
    return asyncio.run(_drain(node, agent, timeout, peer, undo=off or undo, yes=yes))


async def _drain(
    node: str | None,
    agent: str | None,
    timeout: float,
    peers: Sequence[str],
    *,
    undo: bool,
    yes: bool,
) -> int:
    """Raises UnavailableError when stages are still running after `timeout` seconds."""
    identity = Store().require().issue(default_name())
    at = agent or DEFAULT_AGENT
    known: list[tuple[NodeInfo, str]] = []
    if node is not None or not undo:
        known = await _known(identity, peers if node is not None else [*peers, at])
    if node is not None:
        at = _address_of(node, known)
    if not undo:
        _announce(at, known, yes=yes)
    async with connect(at, identity) as channel:
        stub = NodeStub(channel)
        try:
            info = await stub.Drain(DrainRequest(off=undo), timeout=CALL_SECONDS)
            _note(info.name, await _machine_at(at, identity), drained=not undo)
            if undo:
                print(f"{info.name} offers its memory again.")
                return 0
            try:
                async with asyncio.timeout(timeout):
                    while info.stages:
                        await asyncio.sleep(ASK_EVERY)
                        info = await stub.Describe(DescribeNodeRequest(), timeout=CALL_SECONDS)
            except TimeoutError:
                running = ", ".join(_layers(spec) for spec in info.stages)
                raise UnavailableError(
                    f"{info.name} still runs {running} after {timeout:g} s: "
                    "an answer is still running, or its coordinator is older than `drain`"
                ) from None
        except grpc.aio.AioRpcError as error:
            raise as_error(error, f"agent {at}") from None
    print(
        f"{info.name} is empty and takes nothing new until `unicluster drain --undo {info.name}`."
    )
    return 0


async def _known(identity: Identity, peers: Sequence[str]) -> list[tuple[NodeInfo, str]]:
    """The machines of the cluster, with their addresses."""
    async with Members(Store().require(), identity, peers) as members:
        await members.find()
        return await members.nodes()


async def _machine_at(address: str, identity: Identity) -> str:
    """The id of the machine that answers there; empty where its certificate names none."""
    with contextlib.suppress(UniclusterError):
        reached = await Dialer(identity).reach([address], f"agent {address}")
        return reached.machine if reached.is_pinned else ""
    return ""


def _note(name: str, machine: str, *, drained: bool) -> None:
    """Keeps it for the `serve` of this machine; one elsewhere learns it from the agent."""
    try:
        with contextlib.closing(Database()) as database:
            Drains(database).note(name, machine, drained=drained)
    except UniclusterError as error:
        log.warning("a restart of %s's agent may offer it again: %s", name, error)


def _address_of(name: str, known: Sequence[tuple[NodeInfo, str]]) -> str:
    """Where the machine of that name is. Raises NotFoundError where there is none."""
    for info, address in known:
        if info.name == name:
            return address
    there = ", ".join(sorted(info.name for info, _ in known)) or "none"
    raise NotFoundError(f"no machine {shown(name)} answers in this cluster: there are {there}")


def _announce(at: str, known: Sequence[tuple[NodeInfo, str]], *, yes: bool) -> None:
    """Says what becomes of the machine's layers, and asks where a model ends with them.

    Raises InputError where nobody can be asked, click.Abort where they say no.
    """
    machine = next((info for info, address in known if address == at), None)
    if machine is None:
        return  # the call to drain it says why
    others = [Machine.from_proto(info, address) for info, address in known if info is not machine]
    for spec in machine.stages:
        if spec.deployment in machine.orphaned:
            print(f"{machine.name} ends {_layers(spec)}, whose coordinator has gone.")
            continue
        missing = _missing(spec, others)
        if not missing:
            print(f"Others take over {_layers(spec)} from {machine.name}.")
            continue
        reason = (
            f"{spec.model} stops: the other machines have {format_bytes(missing)} too little "
            f"for {_layers(spec)}"
        )
        if yes:
            print(f"{reason}.")
        elif sys.stdin.isatty():
            click.confirm(f"{reason}. Drain {machine.name} anyway?", abort=True)
        else:
            raise InputError(f"{reason}: --yes drains {machine.name} anyway")


def _missing(spec: StageSpec, others: Sequence[Machine]) -> int:
    """Bytes by which other machines have too little for a stage's layers; 0: they fit.

    An estimate, by layers of equal size: the plan, which may move others too, has the last word.
    """
    layers = spec.end_layer - spec.first_layer
    if not layers:
        return 0
    size = spec.memory / layers
    engine = spec.engine or "mlx"
    room = [machine.reach(engine) for machine in others if machine.can(engine)]
    fitting = sum(int(usable // size) for usable in room) if size else layers
    return max(0, int((layers - fitting) * size))


def _layers(spec: StageSpec) -> str:
    return f"layers {layer_range(spec.first_layer, spec.end_layer)} of {spec.model}"


command = Command(
    run,
    arguments=[
        Argument(
            "node",
            "a machine by its name in `unicluster nodes` (default: this one)",
            required=False,
            complete=machine_names,
        )
    ],
    sections={
        "Draining": [
            Option(
                "--agent",
                f"an agent by its address instead (default: {DEFAULT_AGENT})",
                metavar="HOST:PORT",
                complete=addresses,
            ),
            Option(
                "--timeout",
                "how long its answers may take to end (default: 120)",
                type=float,
                default=120.0,
                metavar="SECONDS",
            ),
            Option("--yes", "drain it even if a model stops with it", is_flag=True),
            Option("--undo", "offer the machine again", is_flag=True),
            Option("--off", "another name of --undo", is_flag=True),
            peer_option("a machine that multicast does not reach"),
        ],
    },
    examples=[
        "unicluster drain",
        "unicluster drain studio --timeout 600",
        "unicluster drain studio --undo",
    ],
)
