"""Messages are refused by their bytes: too long, or of more fields than any has."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from unicluster.cluster import sizes
from unicluster.cluster.channels import as_error, bind, connect, make_server
from unicluster.cluster.sizes import COUNTED_ABOVE, MOST_FIELDS, too_large
from unicluster.errors import InputError
from unicluster.trust.cluster import Cluster
from unicluster.v1.chat_pb2 import GenerateRequest, Message
from unicluster.v1.stage_pb2 import Frame, HopMessage
from unicluster.v1.weights_pb2 import ByteRange, HaveRequest, Holdings, ModelFiles, ReadRequest
from unicluster.v1.weights_pb2_grpc import (
    WeightsServicer,
    WeightsStub,
    add_WeightsServicer_to_server,
)


def why(message: Any, most: int = 1 << 30) -> str:
    return too_large(message.SerializeToString(), message.DESCRIPTOR, most)


def test_a_message_longer_than_its_service_accepts() -> None:
    request = GenerateRequest(model="a" * 100)
    assert "103 bytes" not in why(request, 200)
    assert why(request, 50) == "a message of 102 bytes, and at most 50 are accepted"


def test_a_long_text_is_two_fields() -> None:
    assert why(GenerateRequest(messages=[Message(content="a" * COUNTED_ABOVE)])) == ""


def test_empty_messages_are_counted_before_they_are_parsed() -> None:
    assert (
        too_large(b"\x12\x00" * 7_000_000, GenerateRequest.DESCRIPTOR, 1 << 30)
        == f"a message of more than {MOST_FIELDS} fields"
    )


def test_fields_of_parts_count() -> None:
    frame = Frame.FromString(b"\x1a\x00" * COUNTED_ABOVE)
    assert "fields" in why(HopMessage(frame=frame))


def test_a_list_of_numbers_has_a_length() -> None:
    assert why(GenerateRequest(token_ids=[1] * 5_000_000)).startswith("token_ids: 5000000 bytes")


def test_ranges_that_our_own_machines_ask_for_pass() -> None:
    ranges = [ByteRange(start=2**40 + i, end=2**40 + i + 1) for i in range(8000)]
    assert why(ReadRequest(ranges=ranges), 1 << 20) == ""


def test_no_bytes_end_the_walk_in_an_error() -> None:
    rng = random.Random(14)
    valid = GenerateRequest(
        messages=[Message(role="user", content="hello " * 50_000)], stop=["a"], token_ids=[1, 300]
    ).SerializeToString()
    for _ in range(300):
        data = bytearray(valid[: rng.randrange(COUNTED_ABOVE, len(valid))])
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
        too_large(bytes(data), GenerateRequest.DESCRIPTOR, 1 << 30)


class Holder(WeightsServicer):
    async def Have(self, request: HaveRequest, context: Any) -> Holdings:  # noqa: N802
        return Holdings(revision="seen")


@asynccontextmanager
async def holder() -> AsyncIterator[Any]:
    cluster, server = Cluster.new(), make_server()
    port = bind(server, "127.0.0.1", 0, cluster.issue("holder"))
    add_WeightsServicer_to_server(Holder(), server)
    await server.start()
    async with connect(f"127.0.0.1:{port}", cluster.issue("asker")) as channel:
        yield WeightsStub(channel)
    await server.stop(grace=None)


@pytest.mark.parametrize("size", [2 << 20, 20 << 20], ids=["of the service", "of the server"])
async def test_a_server_refuses_what_is_too_large_for_the_service(size: int) -> None:
    async with holder() as weights:
        assert (await weights.Have(HaveRequest())).revision == "seen"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await weights.Have(HaveRequest(files=ModelFiles(model="a" * size)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(size)[:3] in str(as_error(caught.value, "the machine"))


async def test_what_grpc_refuses_is_said_in_one_line() -> None:
    async with holder() as weights:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await weights.Have(HaveRequest(files=ModelFiles(model="a" * (20 << 20))))
    error = as_error(caught.value, "machine ann")
    assert isinstance(error, InputError)
    assert str(error).startswith("machine ann accepts no message of 2097")
    assert str(error).endswith(f"but of {sizes.CONTROL_BYTES} at most")


async def test_one_peer_has_only_so_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicluster.cluster.channels.MOST_CALLS_OF_PEER", 0)
    async with holder() as weights:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await weights.Have(HaveRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
