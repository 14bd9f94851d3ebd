"""Where the files of a model come from: each leaves the hub at most once for the whole cluster."""

import asyncio
import os
from collections.abc import Collection, Iterable, Sequence

import grpc

from unicluster.channels import connect
from unicluster.trust import Identity
from unicluster.v1.node_pb2 import WeightFile
from unicluster.v1.weights_pb2 import HaveRequest, Holdings, ModelFiles
from unicluster.v1.weights_pb2_grpc import WeightsStub

ANSWER_SECONDS = 10.0


async def whole_files(
    model: str, revision: str, addresses: Iterable[str], identity: Identity
) -> set[str]:
    """The files of a model that some machine has in full. Machines that don't answer have none."""
    files = ModelFiles(model=model, revision=revision)
    found = await asyncio.gather(*(_holdings(files, address, identity) for address in addresses))
    return {
        file.name
        for holdings in found
        for file in holdings.files
        if sum(held.end - held.start for held in file.held) == file.size
    }


def assign(
    model: str,
    files: Iterable[WeightFile],
    ranges: Sequence[tuple[int, int]],
    held: Collection[str] = (),
) -> list[list[str]]:
    """For each stage, by its layers [first, end), the files that it fetches from the hub for all.

    Only stages that need something of a file fetch it, and of those the one with the least to
    fetch so far. Files that are `held` already, and those of a directory, nobody fetches.
    """
    fetched: list[list[str]] = [[] for _ in ranges]
    if model == "demo" or os.path.isabs(model):
        return fetched
    burden = [0] * len(ranges)
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        users = [
            index
            for index, (first, end) in enumerate(ranges)
            if (file.outside and first == 0) or any(first <= i < end for i in file.layers)
        ]
        if file.name not in held and users:
            chosen = min(users, key=lambda index: burden[index])
            fetched[chosen].append(file.name)
            burden[chosen] += file.size
    return fetched


async def _holdings(files: ModelFiles, address: str, identity: Identity) -> Holdings:
    async with connect(address, identity) as channel:
        try:
            stub = WeightsStub(channel)
            return await stub.Have(HaveRequest(files=files), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return Holdings()
