"""`unicluster drain`: empties a machine's agent before it is restarted or switched off."""

import asyncio

import grpc

from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.known_machines import addresses
from unicluster.command_line import Command, Option
from unicluster.errors import InputError, UnavailableError
from unicluster.trust.identity import default_name
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import DescribeNodeRequest, DrainRequest, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeStub

CALL_SECONDS = 10.0
ASK_EVERY = 0.25


def run(agent: str, timeout: float, off: bool) -> int:
    if not timeout >= 0:
        raise InputError(f"--timeout {timeout:g}: a number of seconds, 0 or more")
    return asyncio.run(_drain(agent, timeout, off=off))


async def _drain(address: str, timeout: float, *, off: bool) -> int:
    """Raises UnavailableError when stages are still running after `timeout` seconds."""
    identity = Store().require().issue(default_name())
    async with connect(address, identity) as channel:
        node = NodeStub(channel)
        try:
            info = await node.Drain(DrainRequest(off=off), timeout=CALL_SECONDS)
            if off:
                print(f"{info.name} offers its memory again.")
                return 0
            try:
                async with asyncio.timeout(timeout):
                    while info.stages:
                        await asyncio.sleep(ASK_EVERY)
                        info = await node.Describe(DescribeNodeRequest(), timeout=CALL_SECONDS)
            except TimeoutError:
                raise UnavailableError(
                    f"{info.name} still runs {_what(info)} after {timeout:g} s: "
                    "an answer is still running, or its coordinator is older than `drain`"
                ) from None
        except grpc.aio.AioRpcError as error:
            raise as_error(error, f"agent {address}") from None
    print(f"{info.name} is empty and takes nothing new until it is restarted.")
    return 0


def _what(info: NodeInfo) -> str:
    return ", ".join(f"layers {s.first_layer}-{s.end_layer - 1} of {s.model}" for s in info.stages)


command = Command(
    run,
    sections={
        "Draining": [
            Option(
                "--agent",
                "which agent (default: the one on this machine)",
                default="127.0.0.1:47600",
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
            Option("--off", "offer the machine again", is_flag=True),
        ],
    },
    examples=[
        "unicluster drain",
        "unicluster drain --agent studio.local:47600 --timeout 600",
        "unicluster drain --off",
    ],
)
