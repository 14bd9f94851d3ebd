"""Clients that break HTTP, or use it in bad faith: each is got rid of, and others are served."""

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import psutil
import pytest

from coordinator.api import body as bodies
from coordinator.api import responding, server
from coordinator.state.keys import Limits
from tests.support import cluster
from tests.support.deadlines import scaled
from tests.support.http_door import Door, http_door

CHAT = "/v1/chat/completions"
DEADLINE = 20.0
HOST = "Host: 127.0.0.1"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with http_door() as door:
        yield door


def said(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]} | fields


def request(content: bytes, *headers: str, path: str = CHAT) -> bytes:
    """A POST as it is sent; without headers it has the right length."""
    lengths = headers or (f"Content-Length: {len(content)}",)
    return "\r\n".join([f"POST {path} HTTP/1.1", HOST, *lengths, "", ""]).encode() + content


def asking(prompt: str, **fields: Any) -> bytes:
    return request(json.dumps(said(prompt, **fields)).encode())


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(cluster.until, condition, what, DEADLINE)


class Connection:
    """One to the door, with a small buffer, which is read only where a test does."""

    def __init__(self, door: Door) -> None:
        host, port = door.url.removeprefix("http://").split(":")
        self._address = (host, int(port))

    async def __aenter__(self) -> "Connection":
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, self._address)
        self.reader, self.writer = await asyncio.open_connection(sock=link, limit=1024)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Bytes until the door hangs up."""
        data = bytearray()
        async with asyncio.timeout(scaled(DEADLINE)):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(1 << 16):
                    data += piece
        return bytes(data)

    async def gone(self) -> None:
        """Waits until the door has hung up, reading nothing."""
        mine = self.writer.get_extra_info("sockname")

        def is_gone() -> bool:
            links = psutil.Process().net_connections("tcp")  # the door is in this process
            return not any(link.raddr and link.raddr.port == mine[1] for link in links)

        await until(is_gone, "the door has closed the connection")


async def others_are_served(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        answer = await http.post(CHAT, json=said("hello"))
    assert answer.json()["choices"][0]["message"]["content"] == "You said: hello"


async def raw(door: Door, data: bytes) -> bytes:
    async with Connection(door) as connection:
        connection.send(data)
        return await connection.rest()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door with short time limits, which still are long for those who mean well."""
    monkeypatch.setattr(server, "HEAD_SECONDS", scaled(1))
    monkeypatch.setattr(server, "TAKE_SECONDS", scaled(1))
    monkeypatch.setattr(bodies, "BODY_SECONDS", scaled(1))
    monkeypatch.setattr(responding, "SEND_SECONDS", scaled(1))


GOOD = json.dumps(said("hello")).encode()
CHUNKED = "Transfer-Encoding: chunked"
# Each is answered with a refusal, and hung up on.
BROKEN = {
    "two lengths": request(GOOD, f"Content-Length: {len(GOOD)}", "Content-Length: 3"),
    "a list of lengths": request(GOOD, f"Content-Length: {len(GOOD)}, 3"),
    "a length that is no number": request(GOOD, "Content-Length: many"),
    "a negative length": request(GOOD, "Content-Length: -1"),
    "a length and chunks": request(b"0\r\n\r\n", CHUNKED, "Content-Length: 5"),
    "chunks of no size": request(b"x\r\nhello\r\n0\r\n\r\n", CHUNKED),
    "a chunk of negative size": request(b"-5\r\nhello\r\n0\r\n\r\n", CHUNKED),
    "a chunk that is longer than it says": request(b"2\r\nhello\r\n0\r\n\r\n", CHUNKED),
    "chunks of a huge size": request(b"f" * 64 + b"\r\nhello", CHUNKED),
    "an encoding of transfer that is not known": request(GOOD, "Transfer-Encoding: gzip"),
    "two encodings": request(b"0\r\n\r\n", CHUNKED, "Transfer-Encoding: gzip"),
    "a huge header": request(b"", "X-A: " + "a" * (1 << 20)),
    "very many headers": request(b"", *("X-A: a" for _ in range(100_000))),
    "a huge target": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a header without a colon": request(b"", "nonsense"),
    "a header with a line break": request(b"", "X-A: a\x00b"),
    "a target of other bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    "empty lines without end": b"\r\n" * (1 << 17),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_http_is_refused(door: Door, name: str) -> None:
    answer = await raw(door, BROKEN[name])
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 505") or not answer, answer[:200]
    assert door.head.live == 0
    await others_are_served(door)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("part", ["head", "body", "chunks"])
async def test_who_sends_a_byte_at_a_time_is_not_waited_for(door: Door, part: str) -> None:
    begun, byte = {
        "head": (b"", b"a"),
        "body": (request(b"{", "Content-Length: 100000"), b" "),
        "chunks": (request(b"", CHUNKED), b"1\r\n \r\n"),
    }[part]
    async with Connection(door) as slow:
        slow.send(begun)

        async def trickle() -> None:
            while True:
                slow.send(byte)
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        await others_are_served(door)
        answer = await slow.rest()
        trickling.cancel()
    assert answer.startswith(b"HTTP/1.1 408") or (part == "head" and not answer)


@pytest.mark.usefixtures("impatient")
async def test_an_answer_that_nobody_takes_is_given_up_and_its_connection_closed(
    door: Door,
) -> None:
    async with Connection(door) as deaf:
        deaf.send(asking("long", stream=True, n=16))
        await until(lambda: door.head.live > 0, "answers are computed")
        await others_are_served(door)
        await until(lambda: not door.head.live and not door.gateway.running, "they are given up")
        await deaf.gone()


@pytest.mark.usefixtures("impatient")
async def test_who_asks_on_and_on_and_takes_nothing_is_hung_up_on(door: Door) -> None:
    ask = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n\r\n".encode()
    async with Connection(door) as deaf:
        deaf.send(ask * 2000)
        await others_are_served(door)
        await deaf.gone()


async def test_what_waits_for_a_client_that_takes_nothing_is_bounded(door: Door) -> None:
    """Else a few such clients would fill the memory."""
    ask = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n\r\n".encode()
    before = len(asyncio.all_tasks())
    async with contextlib.AsyncExitStack() as stack:
        deaf = [await stack.enter_async_context(Connection(door)) for _ in range(8)]
        for each in deaf:
            each.send(ask * 2000)
        await others_are_served(door)
        # One request of each is answered at a time.
        assert len(asyncio.all_tasks()) < before + 4 * len(deaf)
    await others_are_served(door)


async def test_requests_in_one_go_are_answered_in_order(door: Door) -> None:
    last = request(GOOD, f"Content-Length: {len(GOOD)}", "Connection: close")
    answer = await raw(door, asking("one") + asking("two", stream=True) + last)
    places = [answer.index(text) for text in (b"You said: one", b" two", b"You said: hello")]
    assert places == sorted(places)
    assert answer.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("prompt", ["hold", "silence"])
@pytest.mark.parametrize("how", ["half", "reset"])
async def test_a_client_that_leaves_in_any_way_ends_its_answer(
    door: Door, how: str, prompt: str
) -> None:
    async with Connection(door) as leaving:
        leaving.send(asking(prompt, stream=True))
        await until(lambda: door.head.live == 1, "an answer is computed")
        if how == "half":
            leaving.writer.write_eof()
        else:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # no wait: a reset at once
            link = leaving.writer.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            leaving.writer.close()
        await until(lambda: door.head.live == 0, "it is no longer computed")
    await others_are_served(door)


async def test_a_body_of_less_than_it_says_is_no_request(door: Door) -> None:
    async with Connection(door) as leaving:
        leaving.send(request(GOOD, f"Content-Length: {len(GOOD) + 1}"))
        leaving.writer.write_eof()
        assert b" 200 " not in await leaving.rest()
    assert door.gateway.running == 0


DEEP = 100_000
# Bodies by how they are refused.
REFUSED: dict[str, tuple[int, bytes]] = {
    "lists in lists": (400, b"[" * DEEP + b"]" * DEEP),
    "objects in objects": (400, b'{"messages":' * DEEP + b"1" + b"}" * DEEP),
    "a field twice": (400, b'{"model":"parrot",' + GOOD[1:-1] + b',"model":"other"}'),
    "a field twice in a message": (
        400,
        b'{"messages":[{"role":"user","content":"hi","content":"hello"}]}',
    ),
    "a huge number": (400, b'{"seed":' + b"9" * 100_000 + b"," + GOOD[1:]),
    "a number without end": (400, b'{"seed":Infinity,' + GOOD[1:]),
    "other than UTF-8": (400, GOOD.replace(b"hello", b"\xff\xfe")),
    "half of a character": (400, GOOD.replace(b"hello", b"\\ud800")),
    "UTF-16": (400, GOOD.decode().encode("utf-16")),
    "nothing": (400, b""),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_json_of_bad_faith_is_refused(door: Door, name: str) -> None:
    status, content = REFUSED[name]
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        answer = await http.post(CHAT, content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert door.gateway.running == 0
    await others_are_served(door)


async def test_a_bomb_is_not_unpacked(door: Door) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
            headers = {"Content-Encoding": encoding}
            answer = await http.post(CHAT, content=bomb, headers=headers)
            assert answer.status_code == 415
    await others_are_served(door)


async def test_long_bodies_that_arrive_together_are_bounded(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MOST_WAITING_BYTES", 4 << 20)
    long, count = b" " * (3 << 20), 3
    async with contextlib.AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(Connection(door)) for _ in range(count)]
        for each in waiting:
            each.send(request(long, f"Content-Length: {len(long) + 1}"))
        answers = [asyncio.create_task(each.rest()) for each in waiting]
        done, left = await asyncio.wait(
            answers, timeout=scaled(DEADLINE), return_when=asyncio.FIRST_COMPLETED
        )
        assert all(b"HTTP/1.1 429" in task.result() for task in done)
        assert done
        assert left
        await others_are_served(door)  # a short one is not counted
        for task in left:
            task.cancel()
    # All of it is free again.
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        async with asyncio.timeout(scaled(DEADLINE)):
            # The door notices a moment later that the others have gone.
            while (await http.post(CHAT, content=long + GOOD)).status_code == 429:
                pass
        assert (await http.post(CHAT, content=long + GOOD)).status_code == 200


HEADERS = {
    "a host of other bytes": {"Host": b"\xff"},
    "a host with a user": {"Host": b"127.0.0.1@evil.example"},
    "a host with a path": {"Host": b"evil.example/127.0.0.1"},
    "no host at all": {"Host": b""},
    "a page of other bytes": {"Origin": b"\xff"},
}


@pytest.mark.parametrize("name", HEADERS)
async def test_headers_of_bad_faith_are_refused(door: Door, name: str) -> None:
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        answer = await http.post(CHAT, content=GOOD, headers=HEADERS[name])
    assert answer.status_code in (400, 403, 421)
    await others_are_served(door)


async def test_paths_and_keys_of_other_bytes_are_no_fault_of_the_door(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(DEADLINE)) as http:
        for path in ("/%ff", "/v1/models/%ff%00", "/v1/models/" + "a" * 9000, "//", "/v1/../v1"):
            assert (await http.get(path)).status_code == 404
        door.keys.create("me", Limits())
        for secret in (b"\xff\xfe", b"a" * 9000):
            for headers in ({"Authorization": b"Bearer " + secret}, {"x-api-key": secret}):
                refused = await http.get("/v1/models", headers=headers)
                assert refused.status_code == 401


async def test_many_connections_that_say_nothing_keep_nobody_out(door: Door) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(300):
            await stack.enter_async_context(Connection(door))
        await others_are_served(door)
