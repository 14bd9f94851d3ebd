"""Rotation of the cluster's secret: every agent is handed the new one, then told to drop the old.

In between all trust both, so that nothing has to move at the same moment as something else.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from unicluster.cluster.channels import as_error
from unicluster.cluster.discovery import Browser
from unicluster.cluster.known_machines import known
from unicluster.cluster.records import Kind, is_address, valid_addresses
from unicluster.dialing.dialer import Dialer
from unicluster.errors import TrustError, UniclusterError
from unicluster.trust.identity import default_name
from unicluster.trust.keyring import LOOK_SECONDS, Keyring, Membership
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import DescribeNodeRequest, Rotated, Rotation
from unicluster.v1.node_pb2_grpc import NodeStub

LISTEN_SECONDS = 4.0
ANSWER_SECONDS = 5.0
# After an agent has the new secret, until its worker has a certificate of it and has shown it to
# those to whom it has connections that stand; see unicluster/cluster/standing.py.
SETTLE_SECONDS = 6 * LOOK_SECONDS


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
        hints = {(each.name, each.addresses) for each in browser.found.values()}
    heard = {name for name, _ in hints}
    hints |= {(name, (address,)) for name, address in known().items() if name not in heard}
    waiting = hints | {("", (peer,)) for peer in peers}
    done: set[str] = set()
    asked: dict[str, Asked] = {}
    dialer = Dialer(keyring)
    while waiting:
        done |= {address for _, addresses in waiting for address in addresses}
        told = await asyncio.gather(
            *(_tell_one(*hint, dialer, request) for hint in sorted(waiting))
        )
        asked |= {each.address: each for each, _ in told}
        names = {each.name for each in asked.values() if each.error is None}
        waiting = {
            (name, addresses)
            for _, others in told
            for name, addresses in others
            if name not in names and not done >= set(addresses)
        }
    return list(asked.values())


async def _tell_one(
    name: str, addresses: tuple[str, ...], dialer: Dialer, request: Rotation
) -> tuple[Asked, list[tuple[str, tuple[str, ...]]]]:
    """How that went, and the names and addresses of the other agents that this one knows."""
    who = f"machine {name or addresses[0]}"
    try:
        reached = await dialer.reach(addresses, who, name=name)
    except UniclusterError as error:
        return Asked(name or addresses[0], addresses[0], error=error), []
    async with dialer.connect(reached) as channel:
        node = NodeStub(channel)
        try:
            info = await node.Describe(DescribeNodeRequest(), timeout=ANSWER_SECONDS)
            reply: Rotated = await node.Rotate(request, timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            failed = as_error(error, f"machine {reached.name}")
            return Asked(reached.name, reached.address, error=failed), []
    known = [(each.name, tuple(valid_addresses(each.addresses))) for each in info.known]
    grouped = {address for _, each in known for address in each}
    known += [("", (peer,)) for peer in info.peers if peer not in grouped and is_address(peer)]
    others = [(other, each) for other, each in known if each]
    return Asked(reached.name, reached.address, tuple(reply.clusters)), others
