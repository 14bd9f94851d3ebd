"""Stage workers as child processes: what they tell, why they end, and that they do end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from node.engines.mlx_layout import inspect
from node.worker.config import WorkerConfig
from node.worker.process import STOP_SECONDS, Exit, WorkerProcess
from tests.support.deadlines import scaled
from tests.support.tiny import tiny_config, write_model
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec

DEADLINE = 60.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    path = write_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))
    return WorkerConfig(
        StageSpec(model=str(path), first_layer=2, end_layer=5, users=1),
        node="studio",
        host="127.0.0.1",
        port=0,
        identity=Cluster.new().issue("studio").to_dict(),
    )


def of(config: WorkerConfig, **fields: Any) -> WorkerConfig:
    """The configuration of another stage."""
    spec = StageSpec()
    spec.CopyFrom(config.spec)
    for name, value in fields.items():
        setattr(spec, name, value)
    return replace(config, spec=spec)


@asynccontextmanager
async def started(config: WorkerConfig) -> AsyncIterator[WorkerProcess]:
    worker = await WorkerProcess.start(config)
    try:
        async with asyncio.timeout(scaled(DEADLINE)):
            yield worker
    finally:
        await worker.stop()


async def events_until(worker: WorkerProcess, last: str) -> list[dict[str, Any]]:
    events = []
    async for event in worker.events():
        events.append(event)
        if event["event"] == last:
            break
    return events


async def all_events(worker: WorkerProcess) -> tuple[list[dict[str, Any]], Exit]:
    return [event async for event in worker.events()], await worker.exit()


def test_one_that_ends_before_it_is_told_anything_says_why(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = asyncio.create_subprocess_exec

    async def ended(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await create(*command, **options)
        await process.wait()
        return process

    async def start() -> tuple[list[dict[str, Any]], Exit]:
        async with started(config) as worker:
            return await all_events(worker)

    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no Python starts any more
    monkeypatch.setattr(asyncio, "create_subprocess_exec", ended)
    events, exit_ = uvloop.run(start())  # which refuses to write to a closed pipe

    assert events == []
    assert exit_.reason.startswith("exited with code 1: ")


async def test_a_worker_tells_its_progress_and_its_port(config: WorkerConfig) -> None:
    layers = list(inspect(whole_directory(Path(config.spec.model))).layer_bytes[2:5])
    async with started(config) as worker:
        *progress, ready = await events_until(worker, "ready")

    assert [event["layers"] for event in progress] == [0, 1, 2, 3]
    assert [event["bytes"] for event in progress] == [sum(layers[:done]) for done in range(4)]
    assert {(e["layers_total"], e["bytes_total"]) for e in progress} == {(3, sum(layers))}
    assert ready["port"] > 0
    assert ready["weight_bytes"] == sum(layers)


async def test_a_head_counts_what_is_outside_the_layers(config: WorkerConfig) -> None:
    layout = inspect(whole_directory(Path(config.spec.model)))
    async with started(of(config, first_layer=0, end_layer=2)) as worker:
        *progress, ready = await events_until(worker, "ready")

    total = sum(layout.layer_bytes[:2]) + layout.head_bytes
    assert progress[-1] == {
        "event": "progress",
        "layers": 2,
        "layers_total": 2,
        "bytes": total,
        "bytes_total": total,
    }
    assert ready["weight_bytes"] == total


async def test_quantizing_on_load_does_not_disturb_the_events(config: WorkerConfig) -> None:
    async with started(of(config, quant="q4")) as worker:
        ready = (await events_until(worker, "ready"))[-1]

    quantized = inspect(whole_directory(Path(config.spec.model)), "q4").layer_bytes[2:5]
    assert ready["weight_bytes"] == sum(quantized)


async def test_a_stopped_worker_is_gone(config: WorkerConfig) -> None:
    async with started(config) as worker:
        await events_until(worker, "ready")

        await worker.stop()

        assert not psutil.pid_exists(worker.pid)
        ended = await worker.exit()
        assert (ended.reason, ended.out_of_memory) == ("stopped", False)


async def test_a_worker_is_stopped_while_it_loads(config: WorkerConfig) -> None:
    async with started(config) as worker:
        await worker.stop()

        assert not psutil.pid_exists(worker.pid)
        assert (await worker.exit()).reason == "stopped"


async def test_a_worker_that_does_not_listen_is_killed(config: WorkerConfig) -> None:
    """Slow: it is given seconds to end by itself."""
    async with started(config) as worker:
        await events_until(worker, "ready")
        os.kill(worker.pid, signal.SIGSTOP)

        began = time.monotonic()
        await worker.stop()

        assert time.monotonic() - began < STOP_SECONDS + scaled(2)
        assert not psutil.pid_exists(worker.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_worker_ended_by_a_signal(config: WorkerConfig, number: signal.Signals) -> None:
    async with started(config) as worker:
        await events_until(worker, "ready")

        os.kill(worker.pid, number)

        ended = await worker.exit()
        assert ended.reason == f"ended by signal {number.value} ({number.name})"
        assert not ended.out_of_memory


async def test_a_worker_that_can_not_load_says_why(config: WorkerConfig, tmp_path: Path) -> None:
    async with started(of(config, model=str(tmp_path))) as worker:
        events, ended = await all_events(worker)

    reason = f"{tmp_path}: no config.json in it, so this is no model directory"
    assert events == [{"event": "failed", "reason": reason, "cause": "failed"}]
    assert ended == Exit(reason, (), out_of_memory=False, cause="failed")


async def test_a_worker_whose_port_is_taken_says_so(config: WorkerConfig) -> None:
    async with started(config) as first:
        port = (await events_until(first, "ready"))[-1]["port"]
        async with started(replace(config, port=port)) as second:
            _, ended = await all_events(second)

    assert ended.reason == f"port {port} on 127.0.0.1 is taken: choose another with --port"


async def test_a_worker_that_crashes_leaves_its_last_words(config: WorkerConfig) -> None:
    async with started(replace(config, identity={})) as worker:
        events, ended = await all_events(worker)

    assert [event["event"] for event in events] == ["failed"]
    assert ended.reason.startswith("KeyError: ")
    assert "Traceback (most recent call last):" in ended.stderr_tail


async def test_a_worker_that_never_came_up(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    async with started(config) as worker:
        events, ended = await all_events(worker)

    assert events == []
    assert ended.reason.startswith("exited with code 1: ")
    assert ended.reason.endswith(ended.stderr_tail[-1])


async def test_a_worker_without_memory_says_so(
    config: WorkerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs this program first: it asks for more memory than there is."""
    (tmp_path / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with started(config) as worker:
        _, ended = await all_events(worker)

    assert ended.reason == "exited with code 1: MemoryError"
    assert ended.out_of_memory


OUT_OF_MEMORY = """
import os, traceback
try:
    bytearray(1 << 62)
except MemoryError:
    traceback.print_exc()
    os._exit(1)
"""


async def test_secrets_are_on_no_command_line(config: WorkerConfig) -> None:
    async with started(config) as worker:
        process = psutil.Process(worker.pid)
        shown = [*process.cmdline(), *process.environ().values()]

    assert not [text for text in shown if "PRIVATE KEY" in text]


async def test_ctrl_c_in_the_terminal_does_not_reach_a_worker(config: WorkerConfig) -> None:
    async with started(config) as worker:
        assert os.getsid(worker.pid) == worker.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_whoever_started_it(
    config: WorkerConfig, number: signal.Signals
) -> None:
    program = f"""
import asyncio
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess

async def main():
    worker = await WorkerProcess.start(WorkerConfig.from_line({config.to_line()!r}))
    async for event in worker.events():
        if event["event"] == "ready":
            print(worker.pid, flush=True)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))

        parent.send_signal(number)

        _, alive = psutil.wait_procs([worker], timeout=scaled(DEADLINE))
    assert alive == []
