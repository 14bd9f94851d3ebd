"""A worker's channel and its prints, with child programs that misbehave in a worker's place."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import uvloop

from node.worker import process, report
from node.worker.config import WorkerConfig
from node.worker.process import Exit, WorkerProcess
from tests.support.deadlines import scaled
from unicluster.v1.node_pb2 import StageSpec

DEADLINE = 60.0

# What each program begins with.
CHILD = """
import json, os, subprocess, sys, time
channel = int(sys.argv[-1])
def send(event, **values):
    line = json.dumps({"event": event, **values}).encode() + b"\\n"
    while line:
        line = line[os.write(channel, line):]
"""


@pytest.fixture
def config() -> WorkerConfig:
    return WorkerConfig(
        StageSpec(first_layer=2, end_layer=5),
        node="studio",
        host="127.0.0.1",
        port=0,
        identity={},
    )


@asynccontextmanager
async def started(config: WorkerConfig, body: str) -> AsyncIterator[WorkerProcess]:
    worker = await WorkerProcess.start(config, (sys.executable, "-c", CHILD + body))
    try:
        async with asyncio.timeout(scaled(DEADLINE)):
            yield worker
    finally:
        await worker.stop()


async def run_child(config: WorkerConfig, body: str) -> tuple[list[dict[str, Any]], Exit]:
    """All events of a child program, and its end."""
    async with started(config, body) as worker:
        events, ended = [event async for event in worker.events()], await worker.exit()
        assert not psutil.pid_exists(worker.pid)
    return events, ended


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_no_print_disturbs_the_events(
    config: WorkerConfig, run: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    body = """
import random
garbage = random.Random(0)
for count in range(20):
    for output in (1, 2):
        for noise in (garbage.randbytes(9999), b"x" * (1 << 20) + b"\\n", b'{"event": "ready"}'):
            while noise:
                noise = noise[os.write(output, noise):]
    send("tokens", more=count)
"""
    events, ended = run(run_child(config, body))

    assert events == [{"event": "tokens", "more": count} for count in range(20)]
    assert ended.reason.startswith("exited with code 0")
    assert len(ended.reason) < process.REASON_CHARS + 100
    assert sum(map(len, ended.stderr_tail)) <= report.TAIL_CHARS
    assert all(line.isprintable() for line in ended.stderr_tail)


async def test_an_endless_line_takes_bounded_memory(config: WorkerConfig) -> None:
    body = """
send("tokens", more=1)
for _ in range(1 << 12):
    os.write(2, b"x" * (1 << 16))
send("tokens", more=2)
time.sleep(600)
"""
    async with started(config, body) as worker:
        events = worker.events()
        await anext(events)
        before = psutil.Process().memory_info().rss
        await anext(events)
        grown = psutil.Process().memory_info().rss - before
        await worker.stop()
        ended = await worker.exit()

    assert grown < 1 << 26
    assert sum(map(len, ended.stderr_tail)) <= report.TAIL_CHARS


async def test_an_event_comes_byte_by_byte(config: WorkerConfig) -> None:
    body = """
for byte in json.dumps({"event": "ready", "port": 7, "weight_bytes": 9}) + "\\n":
    os.write(channel, byte.encode())
"""
    events, _ = await run_child(config, body)

    assert events == [{"event": "ready", "port": 7, "weight_bytes": 9}]


async def test_an_event_may_be_megabytes_long(config: WorkerConfig) -> None:
    events, ended = await run_child(config, 'send("failed", reason="x" * (5 << 20))')

    assert [len(event["reason"]) for event in events] == [5 << 20]
    assert len(ended.reason) == 5 << 20


async def test_an_event_that_is_cut_off_by_the_end_is_dropped(config: WorkerConfig) -> None:
    body = """
send("tokens", more=1)
os.write(channel, b'{"event": "ready", "po')
os._exit(3)
"""
    events, ended = await run_child(config, body)

    assert events == [{"event": "tokens", "more": 1}]
    assert ended.reason == "exited with code 3"


async def test_an_unknown_kind_of_event_is_ignored(
    config: WorkerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = 'send("mood", of="worker"); send("tokens", more=1)'
    events, _ = await run_child(config, body)

    assert events == [{"event": "tokens", "more": 1}]
    assert "ignored an event of kind mood" in caplog.text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("hello \x1b[31m", "not JSON: hello \\x1b[31m"),
        ("\xff\xfe", "not JSON: "),
        ("[1]", "not an event: [1]"),
        ('{"event": 1}', "not an event: "),
        ('{"event": "ready", "port": "7"}', "ready without a valid port: "),
        ('{"event": "ready", "port": 4294967296}', "ready without a valid port: "),
        ('{"event": "tokens", "more": true}', "tokens without a valid more: "),
        ('{"event": "tokens", "more": -1}', "tokens without a valid more: "),
        ("[" * 100_000, "not JSON: [["),
    ],
)
async def test_a_line_that_is_no_event_ends_the_worker(
    config: WorkerConfig, line: str, complaint: str
) -> None:
    body = f"""
send("tokens", more=1)
line = {line!r}.encode("latin-1") + b"\\n"
while line:
    line = line[os.write(channel, line):]
send("tokens", more=2)
time.sleep(600)
"""
    events, ended = await run_child(config, body)

    assert events == [{"event": "tokens", "more": 1}]
    assert ended.reason.startswith(f"broke its event channel: {complaint}")
    assert ended.reason.isprintable()


async def test_a_worker_without_a_channel_is_ended(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CLOSED_SECONDS", 0.1)
    _, ended = await run_child(config, "os.close(channel); time.sleep(600)")

    assert ended.reason == "closed its event channel, and did not end"


async def test_children_of_a_worker_that_hold_its_pipes_do_not_keep_it(
    config: WorkerConfig,
) -> None:
    body = """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[channel])
send("tokens", more=1)
os._exit(3)
"""
    async with started(config, body) as worker:
        try:
            events, ended = [event async for event in worker.events()], await worker.exit()
        finally:
            os.killpg(worker.pid, signal.SIGKILL)

    assert events == [{"event": "tokens", "more": 1}]
    assert ended.reason == "exited with code 3"


async def test_an_aborted_metal_computation_means_too_little_memory(config: WorkerConfig) -> None:
    body = """
words = b"[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)\\n"
os.write(2, b"libc++abi: terminating due to uncaught exception: " + words)
os.abort()
"""
    _, ended = await run_child(config, body)

    assert ended.reason.startswith("ended by signal 6 (SIGABRT): libc++abi: terminating due to unc")
    assert ended.out_of_memory


async def test_each_line_is_logged_once_with_its_own_level(
    config: WorkerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = """
import logging
from node.worker.channel import open_channel
open_channel(channel)
logging.getLogger("some.library").warning("careful: %s", "\\x1b[2J")
try:
    {}["key"]
except KeyError:
    logging.getLogger("unicluster.lane").exception("failed")
os.write(1, b" 10%\\r 20%\\r\\n")
os.write(2, b"\\x1b[31mred\\x07\\n\\n")
"""
    await run_child(config, body)

    logged = [(r.levelname, r.name, r.getMessage()) for r in caplog.records]
    records = [record for record in logged if record[1] != "unicluster.worker"]
    printed = [record for record in logged if record[1] == "unicluster.worker"]
    careful, failed = records  # the two streams have no order between them
    assert careful == ("WARNING", "some.library", r"[studio, layers 2-4] careful: \x1b[2J")
    assert failed[:2] == ("ERROR", "unicluster.lane")
    first, *traceback, last = failed[2].splitlines()
    assert (first, last) == ("[studio, layers 2-4] failed", "KeyError: 'key'")
    assert traceback[0] == "Traceback (most recent call last):"
    assert printed == [
        ("INFO", "unicluster.worker", "[studio, layers 2-4]  20%"),
        ("INFO", "unicluster.worker", r"[studio, layers 2-4] \x1b[31mred\x07"),
    ]
