"""`unicluster drain`: empties a machine's agent before it is restarted or switched off."""

import argparse
import asyncio

import grpc

from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.trust import Store, default_name
from unicluster.errors import InputError, UnavailableError
from unicluster.v1.node_pb2 import DescribeNodeRequest, DrainRequest, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeStub

CALL_SECONDS = 10.0
ASK_EVERY = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agent",
        default="127.0.0.1:47600",
        metavar="HOST:PORT",
        help="which agent (default: the one on this machine)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long its answers may take to end (default: 120)",
    )
    parser.add_argument("--off", action="store_true", help="offer the machine again")


def run(args: argparse.Namespace) -> int:
    if not args.timeout >= 0:
        raise InputError(f"--timeout {args.timeout:g}: a number of seconds, 0 or more")
    return asyncio.run(_drain(args.agent, args.timeout, off=args.off))


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
                    "an answer is not at its end, or its coordinator is older than `drain`"
                ) from None
        except grpc.aio.AioRpcError as error:
            raise as_error(error, f"agent {address}") from None
    print(f"{info.name} is empty and takes nothing new until it is restarted.")
    return 0


def _what(info: NodeInfo) -> str:
    return ", ".join(f"layers {s.first_layer}-{s.end_layer - 1} of {s.model}" for s in info.stages)
