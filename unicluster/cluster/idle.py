"""Whether nothing is served: known at once where an agent of this machine knows the others."""

import asyncio
import logging

import grpc

from unicluster.cluster import here
from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.records import Kind
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Credentials, default_name
from unicluster.v1.node_pb2 import DescribeNodeRequest, NodeInfo
from unicluster.v1.node_pb2_grpc import NodeStub

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0


async def idle(cluster: Cluster | None) -> bool:
    """Whether all machines say that they hold no stage; None: with access to the chat alone.

    False where that is not known: no agent runs here, it has only begun, or a machine is silent.
    """
    if cluster is None:
        return False
    identity = cluster.issue(default_name())
    services = here.services(Kind.NODE)
    answers = await asyncio.gather(*(_describe(s.address, identity) for s in services))
    there = [(s, info) for s, info in zip(services, answers, strict=True) if info is not None]
    if not any(service.settled for service, _ in there):
        return False
    asked = {service.address for service in services}
    waiting = {peer for _, info in there for peer in info.peers} - asked
    infos = [info for _, info in there]
    while waiting:
        asked |= waiting
        others = await asyncio.gather(*(_describe(address, identity) for address in waiting))
        known = [info for info in others if info is not None]
        if len(known) < len(others):
            return False
        infos += known
        waiting = {peer for info in known for peer in info.peers} - asked
    return not any(info.stages for info in infos)


async def _describe(address: str, identity: Credentials) -> NodeInfo | None:
    async with connect(address, identity) as channel:
        try:
            return await NodeStub(channel).Describe(DescribeNodeRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.info("%s", as_error(error, f"agent {address}"))
            return None
