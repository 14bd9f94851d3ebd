"""Workers that are alive and do nothing, or whose compute thread has failed: how they end."""

import signal
import time
from pathlib import Path

import mlx_lm
import pytest

import unicluster
from node.worker.config import WorkerConfig
from node.worker.process import Exit, WorkerProcess
from tests.support.deadlines import scaled
from tests.support.tiny import tiny_config, write_model
from unicluster import failpoints
from unicluster.deadlines import VARIABLE
from unicluster.errors import StageError
from unicluster.trust.cluster import Cluster
from unicluster.v1.node_pb2 import StageSpec

PROMPT = [(7 * i * i) % 200 + 1 for i in range(60)]
# Seconds that any work may take here, and that its end may take on an idle machine.
FLOOR = 0.4
NOTICED = 15.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


@pytest.fixture(autouse=True)
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(FLOOR * scaled(1)))


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("hang@1", r" has computed nothing for \d+ s: prefill of \d+ tokens$"),
        ("hang@30", r" has computed nothing for \d+ s: decode$"),
        ("freeze@30", r" has computed nothing for \d+ s: decode; it answers nothing$"),
        ("error(no sense)@30", r" failed while computing: no sense$"),
    ],
    ids=["prefill", "decode", "frozen", "error"],
)
def test_a_stage_whose_compute_thread_is_stuck_is_named(
    llama: Path, monkeypatch: pytest.MonkeyPatch, action: str, reason: str
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"stage.compute={action}")
    model, tokenizer = unicluster.load(str(llama), local_nodes=2)
    with model:
        began = time.monotonic()

        with pytest.raises(StageError, match=r"^machine local-1 \(layers 3 to 5\)" + reason):
            for _ in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=100_000):
                pass

        assert time.monotonic() - began < scaled(NOTICED)


def test_a_slow_stage_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps take hundreds of times as long as those before."""
    monkeypatch.setenv(failpoints.VARIABLE, "stage.compute=delay(350)@18+")
    model, tokenizer = unicluster.load(str(llama), local_nodes=2)
    with model:
        answer = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=20))

    assert answer[-1].finish_reason is not None


async def exit_of(llama: Path, strike: str) -> Exit:
    """How a worker ends that is struck when it begins to load."""
    config = WorkerConfig(
        StageSpec(model=str(llama), first_layer=2, end_layer=5, users=1),
        node="studio",
        host="127.0.0.1",
        port=0,
        identity=Cluster.new().issue("studio").to_dict(),
    )
    worker = await WorkerProcess.start(config)
    try:
        async for event in worker.events():
            if event["event"] == "progress" and strike == "stop":
                worker._process.send_signal(signal.SIGSTOP)
        return await worker.exit()
    finally:
        await worker.stop()


async def test_a_load_that_is_stuck_ends_the_worker(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "worker.load=hang@2")

    ended = await exit_of(llama, "")

    assert ended.reason.startswith("machine studio (layers 2 to 4) has computed nothing for ")
    assert ended.reason.endswith(" s: load")


@pytest.mark.sweep
async def test_a_worker_that_is_frozen_while_it_loads_is_ended(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: a stopped process does not heed a signal to end, and is killed after 5 s."""
    monkeypatch.setenv(failpoints.VARIABLE, "worker.load=delay(200)")

    ended = await exit_of(llama, "stop")

    assert "has said nothing for " in ended.reason
    assert ended.reason.endswith(" s while loading")
