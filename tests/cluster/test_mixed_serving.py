"""`serve MODEL --gguf FILE`: machines with MLX and machines with ggml alone answer as one model."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step

from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until
from tests.support.hub import Hub
from tests.support.tiny_gguf import from_checkpoint, write_gguf

# Several processes start, each of which imports much.
START_DEADLINE = 300.0
# A layer with the caches of two users is 0.28 MB, embedding and lm_head are 0.07 MB each. FIVE:
# that many layers, and both. ONE: without either, so it can't be a head. LAST: and the lm_head
# alone, so it can't be a head of MLX.
FIVE, ONE, LAST = 1_700_000, 330_000, 400_000
ROOM = ("--context", "256", "--users", "2")
PROMPT = [(7 * i * i + 3) % 200 + 1 for i in range(40)]
TOKENS = 24


@dataclass
class Both:
    """A float32 llama as a checkpoint and as a GGUF, and machines for either."""

    path: Path
    file: Path
    cluster: LocalCluster

    def serve(self, *arguments: str) -> ServeProgram:
        form = ("--gguf", str(self.file), *ROOM)
        server = self.cluster.serve(self.path, *form, *arguments)
        server.wait_for("Ctrl-C unloads", START_DEADLINE)
        return server

    def alone(self, prompt: list[int]) -> list[int]:
        """Tokens of the model in one piece, by mlx-lm."""
        model = mlx_lm.load(str(self.path))[0]
        steps = generate_step(mx.array(prompt), model, max_tokens=TOKENS)
        return [token for token, _ in steps]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("mixed")
    path = endless_model(folder / "it")
    file = from_checkpoint(path, folder / "it.gguf")
    with LocalCluster(folder / "cluster", HF_HOME=str(folder / "hf")) as cluster:
        cluster.start_agent("ann", "--engine", "mlx", memory=FIVE)
        cluster.start_agent("bob", "--engine", "ggml", memory=ONE)
        cluster.wait_for_agents()
        yield Both(path, file, cluster)


def told(client: Any, prompt: list[int]) -> Any:
    return client.chat(prompt, temperature=0, max_tokens=TOKENS)


def stages_of(server: ServeProgram) -> list[tuple[str, str]]:
    """Who computes with what, once it answers."""
    info = server.describe()
    stages = [(stage.node, stage.engine) for stage in info.stages]
    return stages if info.state == "ready" else []


def test_a_mixed_ring_answers_as_the_plain_model_does(both: Both) -> None:
    with both.serve() as server, server.client() as client:
        stages = stages_of(server)
        first = told(client, PROMPT)
        longer = [*PROMPT, *first.token_ids, 7]
        second = told(client, longer)
        shown = both.cluster.run("status", "--server", server.address).out

    assert "It offers ggml only." in both.cluster.agents["bob"].out
    assert stages == [("ann", "mlx"), ("bob", "ggml")]
    assert "mlx on ann (it offers no other); ggml on bob (it offers no other)" in server.out
    assert list(first.token_ids) == both.alone(PROMPT)
    assert second.usage.cached_tokens >= len(PROMPT)
    assert list(second.token_ids) == both.alone(longer)
    assert [row.split()[:2] for row in shown.splitlines() if row.startswith(("ann", "bob"))] == [
        ["ann", "mlx"],
        ["bob", "ggml"],
    ]


def test_guesses_are_checked_by_both_engines(both: Both) -> None:
    again = PROMPT[:12] * 3
    with both.serve("--lookup") as server, server.client() as client:
        answer = told(client, again)

    assert answer.usage.drafted_tokens > 0
    assert list(answer.token_ids) == both.alone(again)


@pytest.mark.sweep
def test_another_machine_takes_over_in_the_form_that_it_can_compute(both: Both) -> None:
    with both.serve() as server:
        both.cluster.start_agent("cat", "--engine", "ggml", memory=ONE)
        both.cluster.wait_for_agents()
        both.cluster.agents.pop("bob").kill()
        moved = [("ann", "mlx"), ("cat", "ggml")]
        until(lambda: stages_of(server) == moved, "cat holds bob's layers")
        with server.client() as client:
            answer = told(client, PROMPT)

    assert list(answer.token_ids) == both.alone(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--kv-bits", "8"), "--kv-bits 8: not with --gguf"),
        (("--engine", "mlx"), "--engine mlx: without llama.cpp there is no use for --gguf"),
        ((), "other.gguf: it is another model: it has 4 layers, and it 6"),
    ],
)
def test_what_does_not_go_together_is_refused(
    both: Both, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    other = write_gguf(tmp_path / "other.gguf", layers=4)
    server = both.cluster.serve(both.path, "--gguf", str(other), "--context", "256", *arguments)
    result = server.result(START_DEADLINE)

    assert result.code == 2
    assert reason in result.err
    assert result.err.count("\n") == 1


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("ann", "bob", "ring"),
    [
        (FIVE, ONE, [("ann", "mlx"), ("bob", "ggml")]),
        (LAST, FIVE, [("bob", "ggml"), ("ann", "mlx")]),
    ],
    ids=["mlx first", "ggml first"],
)
def test_both_forms_come_from_the_hub(
    both: Both, tmp_path: Path, ann: int, bob: int, ring: list[tuple[str, str]]
) -> None:
    (tmp_path / "gguf").mkdir()
    shutil.copy(both.file, tmp_path / "gguf" / "it-F32.gguf")
    with Hub() as hub:
        hub.add("me/it", both.path)
        hub.add("me/it-GGUF", tmp_path / "gguf")
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        with LocalCluster(tmp_path / "cluster", **environment) as cluster:
            for name, engine, memory in (("ann", "mlx", ann), ("bob", "ggml", bob)):
                home = str(tmp_path / name)
                cluster.start_agent(name, "--engine", engine, memory=memory, HF_HOME=home)
            cluster.wait_for_agents()
            server = cluster.serve("me/it", "--gguf", "me/it-GGUF:f32", *ROOM)
            server.wait_for("Ctrl-C unloads", START_DEADLINE)
            with server, server.client() as client:
                stages = stages_of(server)
                first = told(client, PROMPT)
                longer = [*PROMPT, *first.token_ids, 7]
                second = told(client, longer)

    assert stages == ring
    assert list(first.token_ids) == both.alone(PROMPT)
    assert second.usage.cached_tokens >= len(PROMPT)
    assert list(second.token_ids) == both.alone(longer)
