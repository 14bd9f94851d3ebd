"""A Chat server, as a process of its own, that does what the prompt says.

It counts the answers in progress as `live_caches`, so that a test can see a cancellation arrive.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToJson

from unicluster.cluster.abort import abort
from unicluster.cluster.channels import bind, make_server
from unicluster.errors import UnavailableError
from unicluster.trust.cluster import Cluster
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1 import stage_pb2
from unicluster.v1.chat_pb2_grpc import ChatServicer, add_ChatServicer_to_server

Events = AsyncIterator[wire.GenerateEvent]
Context = grpc.aio.ServicerContext[wire.GenerateRequest, wire.GenerateEvent]


class ScriptedChat(ChatServicer):
    """Each prompt's effect is at the branch that has it."""

    def __init__(self) -> None:
        self.live = 0
        self.looks = -1  # until it has loaded; below 0: it was not asked to

    async def Generate(  # noqa: N802
        self, request: wire.GenerateRequest, context: Context
    ) -> Events:
        self.live += 1
        try:
            async for event in self._answer(request, context):
                yield event
        finally:
            self.live -= 1

    async def CountTokens(  # noqa: N802
        self, request: wire.GenerateRequest, context: Any
    ) -> wire.TokenCount:
        """Words, for tokens."""
        return wire.TokenCount(
            prompt_tokens=sum(len(message.content.split()) for message in request.messages)
        )

    async def Describe(  # noqa: N802
        self, request: wire.DescribeChatRequest, context: Any
    ) -> wire.ChatInfo:
        return wire.ChatInfo(
            model="parrot",
            quant="q4",
            context=4096,
            users=4,
            state="loading" if self._loads() else "ready",
            detail="3 of 12 GB",
            stages=[
                stage_pb2.StageInfo(node="ann", first_layer=0, end_layer=8, weight_bytes=100),
                stage_pb2.StageInfo(node="bob", first_layer=8, end_layer=12, weight_bytes=50),
            ],
            live_caches=self.live,
        )

    def _loads(self) -> bool:
        """Whether it loads, at one look after another."""
        self.looks = max(self.looks - 1, -1) if self.looks else 0
        return self.looks > 0

    async def _answer(self, request: wire.GenerateRequest, context: Context) -> Events:
        content = request.messages[-1].content if request.messages else "request"
        script, _, argument = content.partition(" ")
        match script:
            case "request":  # shows the request as it came, but for what all clients send
                if not request.resume_s:
                    request.ClearField("resume_s")
                request.ClearField("statuses")
                yield text(MessageToJson(request, preserving_proto_field_name=True))
                yield finish(1)
            case "load":  # "load N": loads first, for so many looks; "load 0": no longer
                if argument == "0":
                    self.looks = 0
                elif self.looks < 0:
                    self.looks = int(argument) + 1
                if self.looks:
                    await abort(context, UnavailableError("parrot is loading"))
                self.looks = -1
                yield text("Loaded.")
                yield finish(1)
            case "think":
                yield wire.GenerateEvent(delta=wire.Delta(reasoning="Let me see. "))
                yield wire.GenerateEvent(delta=wire.Delta(reasoning="A spider..."))
                yield text("Eight.")
                yield finish(3)
            case "escape":  # what a terminal must not get to see
                yield text("\x1b]0;owned\x07fine")
                yield finish(1)
            case "long":  # more than a pipe holds
                for _ in range(10_000):
                    yield text("a line that a reader may not want\n")
                yield finish(10_000, "length")
            case "hold":  # begins, then waits to be cancelled
                yield text("Once upon a time")
                await asyncio.Event().wait()
            case "silence":  # waits to be cancelled
                await asyncio.Event().wait()
            case "fill":  # "fill TOKENS": so many in the answer
                yield text("full")
                yield finish(int(argument))
            case "crowd":  # "crowd N": refuses as too long with more than N messages before it
                if len(request.messages) - 1 > int(argument):
                    reason = "messages: the prompt has 5000 tokens and the context is 4096"
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
                yield text("there is room again")
                yield finish(4)
            case "refuse":  # "refuse CODE DETAILS"
                code, _, details = argument.partition(" ")
                await context.abort(grpc.StatusCode[code], details)
            case "break":  # the same, after a few words
                yield text("Once upon a time")
                code, _, details = argument.partition(" ")
                await context.abort(grpc.StatusCode[code], details)
            case "end":  # ends in silence, as a server never should
                yield text("Once upon a time")
            case _:
                words = f"You said: {request.messages[-1].content}".split(" ")
                for index, word in enumerate(words):
                    yield text(word if index == 0 else f" {word}", token_id=index)
                yield finish(len(words))


def text(words: str, token_id: int = 0) -> wire.GenerateEvent:
    likely = wire.TokenLogprob(token_id=token_id, logprob=-0.25)
    chosen = wire.TokenLogprob(token_id=token_id, logprob=-0.25, top=[likely])
    return wire.GenerateEvent(delta=wire.Delta(text=words, token_ids=[token_id], logprobs=[chosen]))


def finish(tokens: int, reason: str = "stop") -> wire.GenerateEvent:
    return wire.GenerateEvent(
        finish=wire.Finish(
            reason=reason,
            usage=wire.Usage(prompt_tokens=5, completion_tokens=tokens),
            timings=wire.Timings(
                queue_s=0.01, time_to_first_token_s=0.12, decode_s=0.5, tokens_per_s=41.3
            ),
        )
    )


@dataclass
class ChatServer:
    address: str
    cluster: Cluster
    process: subprocess.Popen[str]


@contextmanager
def chat_server(cluster: Cluster) -> Iterator[ChatServer]:
    """A server of `cluster` on a free port of this machine."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.chat_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{cluster.token}\n")
        process.stdin.flush()
        port = int(process.stdout.readline())
        yield ChatServer(f"127.0.0.1:{port}", cluster, process)
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


async def serve() -> None:
    """Reads the token from stdin, writes the port to stdout, serves until killed."""
    cluster = Cluster.from_token(sys.stdin.readline())
    clients = cluster.client_access.authority.ca_pem
    server = make_server()
    add_ChatServicer_to_server(ScriptedChat(), server)
    port = bind(
        server, "", 0, cluster.issue("parrot"), admitted=lambda: clients
    )  # everywhere: mDNS gives any address
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
