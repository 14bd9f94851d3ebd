"""Where the weights come from: one hub, other machines, one directory; never more than needed.

Each machine has a cache of its own. Starting agents and workers takes a few seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from tests.support.cluster import (
    DEADLINE,
    ROOT,
    LocalCluster,
    ServeProgram,
    endless_model,
    until,
)
from tests.support.deadlines import scaled
from tests.support.hub import Hub
from tests.support.mounts import behind_a_disk, can_mount
from tests.support.tiny import tiny_config, write_model
from unicluster.checkpoints.checkpoint import Checkpoint, is_weights
from unicluster.checkpoints.ranges import size

REPO = "org/tiny"
FILE = "model-00003-of-00009.safetensors"
# Big enough for headers and tokenizer to be less than 2 % of it.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="only root of a Linux machine can hide a directory from one process"
)
NODES = ("ann", "bob", "cat", "dan")
PROMPT = "hello"


def reshard(path: Path, files: int) -> Path:
    """Rewrites the weights, layer after layer, into several files with an index."""
    weights: Any = mx.load(str(path / "model.safetensors"))
    names = sorted(weights, key=_layer)
    share = -(-len(names) // files)
    index = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number * share : (number + 1) * share]
        mx.save_safetensors(str(path / file), {n: weights[n] for n in part}, {"format": "mlx"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def _layer(name: str) -> tuple[int, str]:
    _, found, rest = name.partition("layers.")
    return (int(rest.split(".")[0]) if found else -1, name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 8 layers in 9 files."""
    return reshard(endless_model(tmp_path / "model", num_hidden_layers=8), 9)


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, model)
        yield hub


@pytest.fixture
def cluster(tmp_path: Path, hub: Hub) -> Iterator[LocalCluster]:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    with LocalCluster(tmp_path / "cluster", **environment) as cluster:
        yield cluster


def start(cluster: LocalCluster, *names: str, memory: int, **options: Any) -> None:
    """Agents, each with an empty cache."""
    for name in names:
        home = str(cluster.folder / f"hf-{name}")
        cluster.start_agent(name, memory=memory, HF_HOME=home, **options)
    cluster.wait_for_agents()


def copies(cluster: LocalCluster, name: str) -> list[Checkpoint]:
    """The copy in a machine's cache."""
    found = (cluster.folder / f"hf-{name}").glob("hub/models--*/unicluster/*")
    return [c for c in map(Checkpoint.open, found) if c is not None]


def held_bytes(cluster: LocalCluster, name: str) -> int:
    (copy,) = copies(cluster, name)
    return sum(size(copy.available(file)) for file in copy.manifest.weights)


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return {**os.environ, "PYTHONPATH": str(ROOT)} | ours | more


def fetch(
    hub: Hub, home: Path, *arguments: str, prefix: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Fetches a whole repository in a process of its own: a hub's address is read at import."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "tests.support.fetch", *(arguments or [REPO])],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        timeout=scaled(DEADLINE),
        check=False,
    )


def alone(path: Path, tokens: int = 16) -> list[int]:
    model, tokenizer = mlx_lm.load(str(path))[:2]
    chat = [{"role": "user", "content": PROMPT}]
    prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=tokens)
    return [step.token for step in steps]


def answer(server: Any, tokens: int = 16) -> list[int]:
    with server.client() as client:
        return list(client.chat(PROMPT, temperature=0, max_tokens=tokens).token_ids)


def memory_for(path: Path, machines: int) -> int:
    """So much on each that so many machines are needed, but no more."""
    total = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    return int(total / machines * 1.9)


def test_each_file_leaves_the_hub_once_and_goes_only_where_it_is_needed(
    cluster: LocalCluster, hub: Hub, model: Path
) -> None:
    start(cluster, *NODES, memory=memory_for(model, 4))
    with cluster.serve(REPO, "--context", "256") as server:
        got = answer(server)
        stages = server.describe().stages

    assert got == alone(model)
    for file in (file for file in model.iterdir() if file.is_file()):
        bodies = [r for r in hub.requests if r.file == file.name and r.status == 200]
        if is_weights(file.name):
            bodies = [r for r in bodies if r.bytes_sent == file.stat().st_size]
        assert sum(r.bytes_sent > 0 for r in bodies) == 1, file.name
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    for stage in stages:
        needed = {
            file
            for name, file in index.items()
            if stage.first_layer <= _layer(name)[0] < stage.end_layer
            or (stage.first_layer == 0 and _layer(name)[0] < 0)
        }
        (copy,) = copies(cluster, stage.node)
        assert {f for f in copy.manifest.weights if copy.is_whole(f)} <= needed


@pytest.mark.sweep
def test_the_machine_with_the_token_fetches_for_the_others(
    cluster: LocalCluster, hub: Hub, model: Path
) -> None:
    hub.token = "hf_x"  # noqa: S105
    start(cluster, "ann", "bob", memory=memory_for(model, 3))
    start(cluster, "cat", memory=memory_for(model, 3), HF_TOKEN="hf_x")  # noqa: S106
    with cluster.serve(REPO, "--context", "256") as server:
        got = answer(server)
        stages = server.describe().stages

    assert got == alone(model)
    assert len(stages) == 3
    (copy,) = copies(cluster, "cat")
    assert all(copy.is_whole(file) for file in copy.manifest.weights)


@needs_mounts
def test_a_directory_that_only_one_machine_has(cluster: LocalCluster, tmp_path: Path) -> None:
    """Its name, and that of the directory it is in, mean something to shells and globs."""
    plain = write_model(tmp_path / "wide", tiny_config("llama") | WIDE)
    path = shutil.copytree(plain, tmp_path / "it's [o]dd" / "模型 *? $HOME")
    start(cluster, "ann", "bob", memory=memory_for(path, 2), prefix=behind_a_disk(path))
    with cluster.serve(path, "--context", "256") as server:
        got = answer(server)
        stages = server.describe().stages

    assert got == alone(plain)
    assert len(stages) == 2
    for stage in stages:
        assert held_bytes(cluster, stage.node) == pytest.approx(stage.weight_bytes, rel=0.02)


def cut_of(server: ServeProgram) -> list[tuple[str, int, int]]:
    """Which machine has which layers."""
    stages = server.describe().stages
    return [(stage.node, stage.first_layer, stage.end_layer) for stage in stages]


@pytest.mark.sweep
def test_a_second_start_fetches_nothing_and_needs_no_hub(
    cluster: LocalCluster, hub: Hub, model: Path
) -> None:
    start(cluster, "ann", "bob", memory=memory_for(model, 2))
    with cluster.serve(REPO, "--context", "256") as server:
        first, cut = answer(server), cut_of(server)
    hub.close()
    with cluster.serve(REPO, "--context", "256") as server:
        again, cut_again = answer(server), cut_of(server)

    assert again == first
    # Speeds that were measured meanwhile may move a layer, which its machine then lacks.
    fetching = "fetching" in server.out
    assert fetching == (cut_again != cut), (cut, cut_again)


@pytest.mark.sweep
def test_a_machine_that_joins_takes_its_part_from_the_others(
    cluster: LocalCluster, hub: Hub, model: Path
) -> None:
    start(cluster, "ann", memory=memory_for(model, 1))
    with cluster.serve(REPO, "--context", "256"):
        sent = sum(request.bytes_sent for request in hub.requests)
    cluster.agents["ann"].end()
    hub.close()
    start(cluster, "cat", memory=memory_for(model, 2))
    cluster.start_agent(
        "ann",
        memory=memory_for(model, 2),
        HF_HOME=str(cluster.folder / "hf-ann"),
    ).wait_for("Ctrl-C leaves")
    with cluster.serve(REPO, "--context", "256") as server:
        got = answer(server)

    assert sent > 0
    assert got == alone(model)
    assert held_bytes(cluster, "cat") < held_bytes(cluster, "ann")


TROUBLE: dict[str, Callable[[Hub], object]] = {
    "a connection that breaks": lambda hub: hub.drop_after(FILE, 100_000, times=2),
    "a damaged file": lambda hub: hub.corrupt(FILE),
    "an overloaded hub": lambda hub: hub.fail(FILE, status=503, method="GET"),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_a_file_arrives_whole_in_spite_of(
    trouble: Callable[[Hub], object], hub: Hub, model: Path, tmp_path: Path
) -> None:
    assert fetch(hub, tmp_path / "hf", REPO, "description").returncode == 0
    trouble(hub)

    ran = fetch(hub, tmp_path / "hf")

    assert ran.returncode == 0, ran.stderr
    (snapshot,) = (tmp_path / "hf/hub/models--org--tiny/snapshots").iterdir()
    assert (snapshot / FILE).read_bytes() == (model / FILE).read_bytes()


def test_what_came_before_the_end_of_a_process_is_not_fetched_again(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    length = (model / FILE).stat().st_size
    hub.throttle = length
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.fetch", REPO],
        env=environment(hub, tmp_path / "hf"),
        stderr=subprocess.DEVNULL,
    ) as first:
        until(lambda: hub.sent(FILE) > length // 2, "half of a file")
        first.kill()
    hub.throttle = None

    again = fetch(hub, tmp_path / "hf")

    assert again.returncode == 0, again.stderr
    assert hub.sent(FILE) < 1.7 * length


def test_a_file_that_is_always_damaged_is_refused(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "hf", REPO, "description").returncode == 0
    hub.corrupt(FILE, times=99)

    ran = fetch(hub, tmp_path / "hf")

    assert "arrived damaged" in ran.stderr
    assert not list(tmp_path.glob(f"hf/hub/models--org--tiny/snapshots/*/{FILE}"))


REFUSALS: dict[str, tuple[str, Callable[[Hub], object], str]] = {
    "gated": (REPO, lambda hub: hub.gate(REPO), "org/tiny: gated; accept its terms on the hub"),
    "private": (REPO, lambda hub: setattr(hub, "token", "hf_x"), "no such repository on the hub"),
    "missing": ("org/none", lambda hub: None, "org/none: no such repository on the hub"),
    "no hub": (REPO, lambda hub: hub.close(), "org/tiny: the hub can't be reached"),
    "no repository id": ("a/b/c", lambda hub: None, "neither a directory nor a valid name"),
}


@pytest.mark.parametrize(("repo", "change", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_the_reason_of_a_refusal(
    repo: str, change: Callable[[Hub], object], reason: str, hub: Hub, tmp_path: Path
) -> None:
    change(hub)

    ran = fetch(hub, tmp_path / "hf", repo)

    assert ran.returncode != 0
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_token_opens_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_x"  # noqa: S105

    ran = fetch(hub, tmp_path / "hf", HF_TOKEN="hf_x")  # noqa: S106

    assert ran.returncode == 0, ran.stderr


def test_offline_means_offline(hub: Hub, tmp_path: Path) -> None:
    ran = fetch(hub, tmp_path / "hf", HF_HUB_OFFLINE="1")

    assert "not in this machine's cache, and HF_HUB_OFFLINE is set" in ran.stderr
    assert hub.requests == []


@needs_mounts
def test_a_disk_that_is_too_small(hub: Hub, tmp_path: Path) -> None:
    (disk := tmp_path / "hf").mkdir()

    ran = fetch(hub, disk, prefix=behind_a_disk(disk, "300k"))

    assert ran.returncode == 1
    assert "are to be stored in" in ran.stderr
    assert "make room, or set HF_HOME" in ran.stderr


@pytest.mark.sweep
def test_what_another_program_fetched_is_used_without_a_hub(
    cluster: LocalCluster, hub: Hub, model: Path
) -> None:
    """One machine has the snapshot that huggingface_hub left; there is no internet."""
    hub.close()
    repo = cluster.folder / "hf-ann/hub/models--org--tiny"
    shutil.copytree(model, repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    start(cluster, "ann", "bob", memory=memory_for(model, 2))
    with cluster.serve(REPO, "--context", "256") as server:
        got = answer(server)

    assert got == alone(model)
    assert held_bytes(cluster, "bob") < held_bytes(cluster, "ann")
