"""The inspecting child: it answers, it ends in time, and it ends with the question."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.programs import INSPECT
from tests.support.deadlines import scaled
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.checkpoints.inspecting import inspect, inspect_configs
from unicluster.errors import InputError, UnavailableError
from unicluster.v1.node_pb2 import InspectRequest

STUCK = "tests.support.stuck"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> "asyncio.Queue[asyncio.subprocess.Process]":
    """The processes that are started, each as soon as it runs."""
    started: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
    create = asyncio.create_subprocess_exec

    async def noted(*command: str, **options: Any) -> asyncio.subprocess.Process:
        started.put_nowait(child := await create(*command, **options))
        return child

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return started


async def test_a_checkpoint_is_answered_with_its_files(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("llama"))

    layout = await inspect(INSPECT, InspectRequest(model=str(path), context=64))

    assert layout.revision == whole_directory(path).manifest.revision
    assert [file.name for file in layout.files] == ["model.safetensors"]


async def test_a_config_is_answered_without_files() -> None:
    config = json.dumps(tiny_config("llama"))

    layout = await inspect(INSPECT, InspectRequest(model="it", config_json=config))

    assert (layout.model_type, list(layout.files)) == ("llama", [])


async def test_the_reason_of_the_child_is_the_error() -> None:
    with pytest.raises(InputError, match=r"^/nowhere: no longer on this machine$"):
        await inspect(INSPECT, InspectRequest(model="/nowhere"))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"/nowhere/it\.gguf"):
        inspect_configs(INSPECT, [InspectRequest(model="/nowhere/it.gguf")])


def test_a_gguf_that_aborts_llama_cpp_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Halves of a rotation are of whole numbers, which llama.cpp checks as it builds the graph."""
    pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")
    file = write_gguf(tmp_path / "it.gguf", "qwen3", metadata={"rope.dimension_count": 15})
    said = (
        rf"^{re.escape(str(file))}: inspecting it crashed \(SIGABRT: qwen3\.cpp:\d+: "
        r"GGML_ASSERT\(n_embd_head == n_rot\) failed\): "
    )

    with pytest.raises(InputError, match=said):
        inspect_configs(INSPECT, [InspectRequest(model=str(file), context=64)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", r"^it: inspecting it crashed \(SIGSEGV\): it is damaged"),
        ("\x1b[2Jgone", r"^it: inspecting it crashed \(SIGSEGV: \\x1b\[2Jgone\): it is damaged"),
        ("what():  std::bad_alloc", r"^it: can't be inspected within the limits .*SIGSEGV"),
    ],
    ids=["silent", "controls", "memory"],
)
async def test_last_words_of_a_crash_are_the_reason(
    monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setenv("LAST_WORDS", words)

    with pytest.raises(InputError, match=said):
        await inspect("tests.support.crashing", InspectRequest(model="it"))


def test_no_requests_need_no_child() -> None:
    assert inspect_configs("no.such.program", []) == []


async def test_a_child_that_does_not_answer_is_killed(
    children: "asyncio.Queue[asyncio.subprocess.Process]",
) -> None:
    with pytest.raises(UnavailableError, match=r"^it: no answer after 1 s: "):
        await inspect(STUCK, InspectRequest(model="it"), deadline_s=1)

    assert not psutil.pid_exists(children.get_nowait().pid)


async def test_a_child_ends_with_the_question(
    children: "asyncio.Queue[asyncio.subprocess.Process]",
) -> None:
    asking = asyncio.create_task(inspect(STUCK, InspectRequest(model="it")))
    child = await asyncio.wait_for(children.get(), scaled(60))

    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert not psutil.pid_exists(child.pid)


async def test_an_absurd_configuration_ends_at_the_limits_of_the_child() -> None:
    """Slow, because half a gigabyte is filled first: the child has smaller limits than usual."""
    config = json.dumps({**tiny_config("llama"), "num_hidden_layers": 10**9})

    with pytest.raises(InputError, match=r"MemoryError|more than|within the limits"):
        await inspect("tests.support.limited", InspectRequest(model="it", config_json=config))
