"""Sources of a model's files: each is fetched from the hub at most once for the whole cluster."""

import asyncio
import logging
import os
from collections.abc import Collection, Iterable, Sequence

import grpc

from unicluster.cluster.channels import as_error, connect
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import TryHubRequest, WeightFile
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.weights_pb2 import HaveRequest, Holdings, ModelFiles
from unicluster.v1.weights_pb2_grpc import WeightsStub

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
# The hub may be slow to answer, and huggingface_hub tries again.
HUB_SECONDS = 30.0


async def hub_files(
    model: str,
    revision: str,
    files: Sequence[WeightFile],
    ranges: Sequence[tuple[int, int]],
    stages: Sequence[str],
    others: Iterable[str],
    identity: Credentials,
    available: Collection[str] = (),
    *,
    has_lm_head: bool = False,
) -> list[list[str]]:
    """Files that each stage is to fetch from the hub.

    Args:
        ranges: the layers [first, end) of each stage.
        stages: where the agent of each stage answers; empty: it is this process.
        others: agents that may have files already.
        available: files that are known to be somewhere already.
        has_lm_head: the last stage makes the logits.
    """
    if _is_local(model):  # a machine that is slow to answer must not delay a plan for nothing
        return [[] for _ in ranges]
    available = await whole_files(model, revision, others, identity) | set(available)
    assigned = assign(model, files, ranges, available, has_lm_head=has_lm_head)
    if not any(assigned):
        return assigned
    tried = await asyncio.gather(*(_reaches_hub(model, revision, a, identity) for a in stages))
    return assign(model, files, ranges, available, tried, has_lm_head=has_lm_head)


async def whole_files(
    model: str, revision: str, addresses: Iterable[str], identity: Credentials
) -> set[str]:
    """The files of a model that some machine has in full. Machines that don't answer have none."""
    files = ModelFiles(model=model, revision=revision)
    answers = await asyncio.gather(*(_holdings(files, address, identity) for address in addresses))
    return {
        file.name
        for holdings in answers
        for file in holdings.files
        if sum(part.end - part.start for part in file.held) == file.size
    }


def assign(
    model: str,
    files: Iterable[WeightFile],
    ranges: Sequence[tuple[int, int]],
    available: Collection[str] = (),
    reaching: Sequence[bool] = (),
    *,
    has_lm_head: bool = False,
) -> list[list[str]]:
    """Files that each stage, by its layers [first, end), fetches from the hub for all.

    Of the stages that need something of a file the one with the least to fetch so far fetches
    it. If `reaching` says that none of those reaches the hub, another stage does that can; if
    none can, it is tried all the same, for the reason. Files that are `available` already, and
    those of a directory, nobody fetches. `has_lm_head`: the last stage makes the logits.
    """
    fetched: list[list[str]] = [[] for _ in ranges]
    if _is_local(model):
        return fetched
    able = {index for index, reaches in enumerate(reaching) if reaches} or set(range(len(ranges)))
    burden = [0] * len(ranges)
    last = len(ranges) - 1
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        users = {
            index
            for index, (first, end) in enumerate(ranges)
            if (file.outside and (first == 0 or (has_lm_head and index == last)))
            or any(first <= i < end for i in file.layers)
        }
        if file.name not in available and users:
            chosen = min(users & able or able, key=lambda index: (burden[index], index))
            fetched[chosen].append(file.name)
            burden[chosen] += file.size
    return fetched


def _is_local(model: str) -> bool:
    """Whether a model is a directory, or made up: no file of it is on the hub."""
    return model == "demo" or os.path.isabs(model)


async def _reaches_hub(model: str, revision: str, address: str, identity: Credentials) -> bool:
    if not address:
        return True  # this process has had the model's description from there
    async with connect(address, identity) as channel:
        try:
            request = TryHubRequest(model=model, revision=revision)
            await NodeStub(channel).TryHub(request, timeout=HUB_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.info("%s", as_error(error, f"machine at {address}"))
            return False
    return True


async def _holdings(files: ModelFiles, address: str, identity: Credentials) -> Holdings:
    async with connect(address, identity) as channel:
        try:
            stub = WeightsStub(channel)
            return await stub.Have(HaveRequest(files=files), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return Holdings()
