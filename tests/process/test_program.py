"""Children import nothing from the directory in which they, or their parent, were started."""

import asyncio
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from coordinator.programs import INSPECT
from node.agent.probe import probe
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster.checkpoints.inspecting import inspect
from unicluster.program import ROOT, child_environment, code_command, module_command
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import InspectRequest, StageSpec

# What every child of ours imports, one way or the other.
SHADOWED = ("json", "logging", "node", "mlx", "mlx_lm", "grpc", "unicluster", "llama_cpp")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory full of modules that say that they were imported."""
    sprung = tmp_path / "sprung"
    here = tmp_path / "here"
    here.mkdir()
    for name in SHADOWED:
        text = f"open({str(sprung)!r}, 'a').write('{name} ')\nraise SystemExit(77)\n"
        (here / f"{name}.py").write_text(text)
    monkeypatch.chdir(here)
    # Relative entries lead to the working directory too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(ROOT)]))
    return sprung


def test_the_trap_springs_for_plain_python(trap: Path) -> None:
    subprocess.run(["python3", "-m", "node.inspect"], timeout=60, stdin=subprocess.DEVNULL)

    assert trap.exists()


def test_commands_of_ours_find_the_project_and_nothing_else(trap: Path) -> None:
    commands = [code_command("import json, node, unicluster"), module_command("unicluster")]
    for command in commands:
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, timeout=60, text=True
        )
        assert done.returncode in (0, 2), done.stderr

    assert not trap.exists()


def test_the_inspecting_program(trap: Path) -> None:
    layout = asyncio.run(inspect(INSPECT, InspectRequest(model="demo", users=1)))

    assert layout.layer_bytes
    assert not trap.exists()


def test_the_probe_of_this_machine(trap: Path) -> None:
    assert probe().backend

    assert not trap.exists()


async def started(config: WorkerConfig) -> tuple[WorkerProcess, Path]:
    """A worker that is ready, and its working directory."""
    worker = await WorkerProcess.start(config)
    async with asyncio.timeout(120):
        async for event in worker.events():
            if event["event"] == "ready":
                break
    return worker, Path(psutil.Process(worker.pid).cwd())


def test_a_worker_has_a_directory_of_its_own(trap: Path) -> None:
    identity = Cluster.new().issue("ann")
    spec = StageSpec(model="demo", first_layer=0, end_layer=1, context=64, users=1)
    config = WorkerConfig(
        node="ann", host="127.0.0.1", port=0, identity=identity.to_dict(), spec=spec
    )

    async def run() -> tuple[Path, list[Path]]:
        worker, folder = await started(config)
        within = await asyncio.to_thread(lambda: list(folder.iterdir()))
        await worker.stop()
        return folder, within

    folder, within = asyncio.run(run())

    assert folder != Path.cwd()
    assert within == []
    assert not folder.exists()
    assert not trap.exists()
