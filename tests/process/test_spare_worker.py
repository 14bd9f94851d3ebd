"""A spare worker takes a stage at once, is not taken where it would not do, and never stays."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from node.supervision.spare import SpareWorker
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from tests.support.deadlines import scaled
from tests.support.tiny import tiny_config, write_model
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec

DEADLINE = 60.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    path = write_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))
    spec = StageSpec(model=str(path), first_layer=2, end_layer=5, users=1)
    identity = Cluster.new().issue("studio").to_dict()
    return WorkerConfig(spec, node="studio", host="127.0.0.1", port=0, identity=identity)


@asynccontextmanager
async def spares(**options: bool) -> AsyncIterator[SpareWorker]:
    workers = SpareWorker(lambda: False, quiet_seconds=0.0, **options)
    try:
        async with asyncio.timeout(scaled(DEADLINE)):
            yield workers
    finally:
        await workers.close()


async def true(condition: Callable[[], object]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


async def one(workers: SpareWorker) -> int:
    """The process id of the spare, once there is one."""
    await true(lambda: workers.pid)
    assert workers.pid is not None
    return workers.pid


async def is_ready(worker: WorkerProcess) -> bool:
    return "ready" in [event["event"] async for event in first_until_ready(worker)]


async def first_until_ready(worker: WorkerProcess) -> AsyncIterator[dict[str, object]]:
    async for event in worker.events():
        yield event
        if event["event"] == "ready":
            return


async def test_the_spare_gets_the_next_stage_and_another_one_follows(config: WorkerConfig) -> None:
    async with spares() as workers:
        workers.renew({})
        spare = await one(workers)

        worker = await workers.start(config, {})
        try:
            assert worker.pid == spare
            assert await is_ready(worker)
            assert await one(workers) not in (0, spare)
        finally:
            await worker.stop()


async def test_a_spare_of_another_environment_is_ended(config: WorkerConfig) -> None:
    async with spares() as workers:
        workers.renew({})
        spare = await one(workers)

        worker = await workers.start(config, {"SOME_DEVICE": "1"})
        try:
            assert worker.pid != spare
            assert not psutil.pid_exists(spare)
            assert await is_ready(worker)
            assert psutil.Process(worker.pid).environ()["SOME_DEVICE"] == "1"
        finally:
            await worker.stop()


async def test_a_spare_that_was_killed_is_not_taken(config: WorkerConfig) -> None:
    async with spares() as workers:
        workers.renew({})
        spare = await one(workers)
        psutil.Process(spare).kill()
        await true(lambda: workers.pid is None)

        worker = await workers.start(config, {})
        try:
            assert worker.pid != spare
            assert await is_ready(worker)
        finally:
            await worker.stop()


async def test_none_is_started_while_stages_load() -> None:
    loading, looked = True, asyncio.Event()

    def is_busy() -> bool:
        looked.set()
        return loading

    workers = SpareWorker(is_busy, quiet_seconds=0.0)
    workers.renew({})
    await looked.wait()
    assert workers.pid is None
    loading = False
    await asyncio.wait_for(one(workers), scaled(DEADLINE))
    await workers.close()


async def test_none_is_left_where_the_agent_closes_while_it_starts() -> None:
    began, prepared = asyncio.Event(), []

    async def prepare(environment: object) -> WorkerProcess:
        began.set()
        prepared.append(await WorkerProcess.prepare())
        return prepared[-1]

    workers = SpareWorker(lambda: False, quiet_seconds=0.0, prepare=prepare)
    workers.renew({})
    await began.wait()

    await workers.close()

    assert [psutil.pid_exists(worker.pid) for worker in prepared] == [False]


async def test_there_is_none_where_it_is_switched_off(config: WorkerConfig) -> None:
    async with spares(enabled=False) as workers:
        workers.renew({})
        worker = await workers.start(config, {})
        try:
            assert await is_ready(worker)
            assert workers.pid is None
        finally:
            await worker.stop()


def test_a_spare_ends_with_whoever_started_it(tmp_path: Path) -> None:
    program = """
import asyncio
import os
from node.worker.process import WorkerProcess

async def main():
    worker = await WorkerProcess.prepare()
    print(worker.pid, flush=True)
    await worker.exit()

asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))

        parent.kill()

        _, alive = psutil.wait_procs([worker], timeout=scaled(DEADLINE))
    assert alive == []


async def test_a_broken_library_of_another_engine_does_not_end_the_spare(
    config: WorkerConfig, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    code = f"open({str(imported)!r}, 'w').close()\nraise RuntimeError('libllama.so is damaged')\n"
    (tmp_path / "llama_cpp.py").write_text(code)
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    async with spares() as workers:
        workers.renew(environment)
        spare = await one(workers)
        await true(imported.exists)

        worker = await workers.start(config, environment)
        try:
            assert worker.pid == spare
            assert await is_ready(worker)
        finally:
            await worker.stop()
