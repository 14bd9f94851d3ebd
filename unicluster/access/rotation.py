"""Rotation of the cluster's secret: every agent is handed the new one, then told to drop the old.

In between all trust both, so that nothing has to move at the same moment as something else.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from unicluster.cluster.channels import as_error, connect
from unicluster.cluster.discovery import Browser
from unicluster.cluster.known_machines import known
from unicluster.cluster.records import Kind
from unicluster.errors import TrustError, UniclusterError
from unicluster.trust.identity import default_name
from unicluster.trust.keyring import LOOK_SECONDS, Keyring, Membership
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import DescribeNodeRequest, Rotated, Rotation
from unicluster.v1.node_pb2_grpc import NodeStub

LISTEN_SECONDS = 4.0
ANSWER_SECONDS = 5.0
# After an agent has the new secret, until its worker has a certificate of it.
SETTLE_SECONDS = 3 * LOOK_SECONDS


@dataclass(frozen=True)
class Asked:
    """A machine that was told of a rotation. `trusts`: fingerprints, the newest first."""

    name: str
    address: str
    trusts: tuple[str, ...] = ()
    error: UniclusterError | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


async def start(store: Store, peers: Sequence[str]) -> list[Asked]:
    """Makes a new secret, keeps it here beside the old one, and hands it to all agents.

    Returns once those who took it show certificates of it. Raises as Store.rotate does.
    """
    new = store.rotate()
    asked = await _tell(store, peers, Rotation(token=new.token))
    await asyncio.sleep(SETTLE_SECONDS)
    return asked


async def finish(store: Store, peers: Sequence[str], *, force: bool) -> list[Asked]:
    """Has all agents, and this machine, trust the old secret no longer.

    Raises TrustError when no rotation is under way and, unless `force`, when a machine that was
    seen has not got the new secret, naming it.
    """
    newest, *older = store.generations()
    if not older:
        raise TrustError("no rotation is under way: `unicluster token rotate` begins one")
    looked = await _tell(store, peers, Rotation())
    behind = [each for each in looked if newest.fingerprint not in each.trusts[:1]]
    if behind and not force:
        names = ", ".join(str(each) for each in behind)
        raise TrustError(
            f"{names}: not moved to the new token; `unicluster join --replace` with it on each, "
            "or --force, which leaves them out"
        )
    asked = await _tell(store, peers, Rotation(finish=True))
    store.finish_rotation()
    return asked


async def _tell(store: Store, peers: Sequence[str], request: Rotation) -> list[Asked]:
    """Sends `request` to every agent that is heard, named, known to others, or was seen before."""
    membership = Membership(store.require(), store)
    keyring = Keyring.of_member(membership, default_name())
    async with Browser(Kind.NODE, lambda: membership.fingerprints) as browser:
        await asyncio.sleep(LISTEN_SECONDS)
        names = {machine.address: machine.name for machine in browser.found.values()}
    remembered = {address: name for name, address in known().items() if name not in names.values()}
    names = {**remembered, **names}
    waiting, done = {*names, *peers}, set[str]()
    asked: dict[str, Asked] = {}
    while waiting:
        done |= waiting
        told = await asyncio.gather(
            *(_tell_one(names.get(a, a), a, keyring, request) for a in sorted(waiting))
        )
        asked |= {each.address: each for each, _ in told}
        waiting = {peer for _, others in told for peer in others} - done
    return list(asked.values())


async def _tell_one(
    name: str, address: str, keyring: Keyring, request: Rotation
) -> tuple[Asked, list[str]]:
    """How that went, and the addresses of the other agents that this one knows."""
    async with connect(address, keyring) as channel:
        node = NodeStub(channel)
        try:
            info = await node.Describe(DescribeNodeRequest(), timeout=ANSWER_SECONDS)
            reply: Rotated = await node.Rotate(request, timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            return Asked(name, address, error=as_error(error, f"machine {name}")), []
    return Asked(info.name, address, tuple(reply.clusters)), list(info.peers)
