"""Caches that are read-only, or damaged: what is whole in them is used, and the rest fetched anew.

A process of its own for each fetch: a hub's address is read at import.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from tests.cluster.test_bad_input import without_privileges
from tests.cluster.test_fetching import REPO, environment, fetch
from tests.support.cluster import DEADLINE, endless_model
from tests.support.deadlines import scaled
from tests.support.hub import Hub
from unicluster.checkpoints.checkpoint import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, model)
        yield hub


def snapshot(home: Path, model: Path, commit: str) -> Path:
    """A snapshot of the model in a cache, as another program leaves it, without blobs."""
    repo = home / "hub/models--org--tiny"
    shutil.copytree(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def copies(cache: Path) -> list[Checkpoint]:
    found = cache.glob("models--org--tiny/unicluster/*")
    return [copy for copy in map(Checkpoint.open, sorted(found)) if copy is not None]


def lock(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def unlock(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_read_only_cache_is_used_and_left_as_it_is(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.close()
    home, ours = tmp_path / "hf", tmp_path / "ours"
    snapshot(home, model, COMMIT)
    lock(home)
    before = listing(home)
    try:
        prefix = without_privileges()
        ran = fetch(hub, home, prefix=prefix, XDG_CACHE_HOME=str(ours), HF_HUB_OFFLINE="1")
        assert listing(home) == before
    finally:
        unlock(home)

    assert (ran.returncode, ran.stderr) == (0, "")
    (copy,) = copies(ours / "unicluster/hub")
    assert all(copy.is_whole(name) for name in copy.manifest.files)
    weights = copy.root / "model.safetensors"
    assert weights.resolve().is_relative_to(home.resolve())  # not copied
    assert load_tokenizer(copy.root).encode("ab")


def test_a_plan_is_made_from_a_read_only_cache(hub: Hub, model: Path, tmp_path: Path) -> None:
    home, ours = tmp_path / "hf", tmp_path / "ours"
    snapshot(home, model, COMMIT)
    hub.close()
    lock(home)
    try:
        planned = subprocess.run(
            [
                *(*without_privileges(), sys.executable, "-m", "unicluster", "plan", REPO),
                *("--fleet", "2x mac-mini-m4-16"),
            ],
            env=environment(hub, home, XDG_CACHE_HOME=str(ours)),
            capture_output=True,
            text=True,
            timeout=scaled(DEADLINE),
            check=False,
        )
    finally:
        unlock(home)

    assert planned.returncode == 0, planned.stderr
    assert "org/tiny" in planned.stdout


def test_what_a_read_only_cache_lacks_is_fetched_elsewhere(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    home, ours = tmp_path / "hf", tmp_path / "ours"
    commit = hub.repos[REPO].commit
    (snapshot(home, model, commit) / "model.safetensors").unlink()
    lock(home)
    try:
        ran = fetch(hub, home, prefix=without_privileges(), XDG_CACHE_HOME=str(ours))
    finally:
        unlock(home)

    assert ran.returncode == 0, ran.stderr
    assert hub.sent("config.json") == hub.sent("tokenizer.json") == 0
    (copy,) = copies(ours / "unicluster/hub")
    assert (copy.root / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()


def test_nothing_that_can_be_written_is_said_so(hub: Hub, model: Path, tmp_path: Path) -> None:
    home, ours = tmp_path / "hf", tmp_path / "ours"
    snapshot(home, model, COMMIT)
    ours.mkdir()
    lock(home)
    lock(ours)
    try:
        ran = fetch(
            *(hub, home), prefix=without_privileges(), XDG_CACHE_HOME=str(ours), HF_HUB_OFFLINE="1"
        )
    finally:
        unlock(home)
        unlock(ours)

    assert ran.returncode == 1
    assert "can't be written: Permission denied; set HF_HOME to a directory that can" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_damaged_small_files_count_as_absent(hub: Hub, model: Path, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    there = snapshot(home, model, hub.repos[REPO].commit)
    damage = {
        "config.json": b"",
        "tokenizer.json": bytes((there / "tokenizer.json").stat().st_size),
        "tokenizer_config.json": b"[]",
    }
    for name, content in damage.items():
        (there / name).write_bytes(content)

    ran = fetch(hub, home, REPO, "description")

    assert ran.returncode == 0, ran.stderr
    (copy,) = copies(home / "hub")
    for name in damage:
        assert (copy.root / name).read_bytes() == (model / name).read_bytes()
    assert hub.sent("model.safetensors") == 0


def test_a_file_that_is_damaged_after_it_was_fetched_is_fetched_again(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    assert fetch(hub, tmp_path / "hf").returncode == 0
    (copy,) = copies(tmp_path / "hf/hub")
    blob = (copy.root / "tokenizer.json").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))

    ran = fetch(hub, tmp_path / "hf", REPO, "description")

    assert ran.returncode == 0, ran.stderr
    assert (copy.root / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_without_a_hub_the_damaged_file_is_named(hub: Hub, model: Path, tmp_path: Path) -> None:
    fetched, left = tmp_path / "fetched", tmp_path / "left"
    assert fetch(hub, fetched).returncode == 0
    (copy,) = copies(fetched / "hub")
    hub.close()
    for home, file in (
        (fetched, copy.root / "tokenizer.json"),
        (left, snapshot(left, model, COMMIT) / "tokenizer.json"),
    ):
        file.resolve().write_text("[")
        ran = fetch(hub, home, REPO, "description")
        assert ran.returncode == 1
        line = ran.stderr.splitlines()[-1]
        assert line.startswith(f"{file}: damaged: ")
        assert "and it can't be fetched again: org/tiny: the hub can't be reached" in line


def test_what_the_hub_itself_has_damaged_is_fetched_once(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "generation_config.json").write_text(json.dumps({"temperature": "warm"}))
    hub.add(REPO, broken)
    for _ in range(2):
        assert fetch(hub, tmp_path / "hf", REPO, "description").returncode == 0

    size = os.path.getsize(broken / "generation_config.json")
    assert hub.sent("generation_config.json") == size
