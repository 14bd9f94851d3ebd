"""Prefixes on the disks of rings of both engines, opened again by other processes."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.pipeline.disk_prefixes import DiskPrefixes
from node.prefixes.folder import BLOCK, STATE
from node.prefixes.folder import TOKENS as TOKENS_FILE
from tests.support.deadlines import scaled
from tests.support.mixed import mixed
from tests.support.prefixes import files_in, index_in
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint, write_gguf
from unicluster.trust.cluster import Cluster

TOKENS = np.arange(5, 305) % 250  # a block, and more
GROWN = np.append(TOKENS, [7, 8, 9])
SECONDS = 60.0


def disks(model: Any, directory: Path) -> DiskPrefixes:
    """Those of a ring whose head starts now, with its own in `directory`/0."""
    index = index_in(directory / "0")
    model._hollow.keep_prefixes(index.store)
    return DiskPrefixes(model, index, 0.0)


def next_logits(model: Any, cache: list[Any]) -> Any:
    return np.array(model(mx.array([[3, 4]]), cache=cache)[:])


@pytest.mark.parametrize("engines", [("mlx", "ggml", "mlx"), ("ggml", "mlx", "ggml")])
def test_a_ring_goes_on_from_the_disks_of_one_before_if_all_have_it(
    engines: tuple[str, ...], tmp_path: Path
) -> None:
    path, disk = tmp_path / "tiny", tmp_path / "disk"
    write_model(path, tiny_config("llama"))
    file = from_checkpoint(path, tmp_path / "tiny.gguf")
    identity = Cluster.new().issue("tests")
    with mixed(path, file, engines, identity=identity, disk=disk) as model:
        cache = make_prompt_cache(model)
        model(mx.array([TOKENS.tolist()]), cache=cache)
        before = disks(model, disk)
        before.save(TOKENS, cache, trimmable=True)
        assert before.settle(scaled(SECONDS))
        blocks = inodes(disk, BLOCK)
        model(mx.array([[7, 8, 9]]), cache=cache)[:]
        before.save(GROWN, cache, trimmable=True, idle=True)
        assert before.settle(scaled(SECONDS))
        expected = next_logits(model, cache)
    assert len(blocks) == len(engines)
    assert inodes(disk, BLOCK) == blocks  # they were not written again
    prompt = np.append(GROWN, [3, 4])
    with mixed(path, file, engines, identity=identity, disk=disk) as model:
        after = disks(model, disk)
        found = after.find(prompt, 0)
        assert found is not None
        assert found[1] == len(GROWN)
        cache = after.recall(*found) or []
        assert np.array_equal(next_logits(model, cache), expected)
        shutil.rmtree(disk / "1")
        assert after.recall(*found) is None
        assert after.find(prompt, 0) is None
        assert after.settle(scaled(SECONDS))
    assert files_in(disk / "0", STATE) == files_in(disk / "0", TOKENS_FILE) == []


def inodes(disk: Path, suffix: str) -> dict[Path, int]:
    """Files with that suffix of all machines."""
    files = [file for machine in disk.iterdir() for file in files_in(machine, suffix)]
    return {file: file.stat().st_ino for file in files}


def test_a_prefix_longer_than_its_windows_is_of_use_as_a_whole(tmp_path: Path) -> None:
    """llama.cpp saves of a layer with a window no more than that."""
    disk = tmp_path / "disk"
    file = write_gguf(tmp_path / "tiny.gguf", "gemma3", 6)
    identity = Cluster.new().issue("tests")
    with mixed(file, file, ("ggml", "ggml", "ggml"), identity=identity, disk=disk) as model:
        cache = make_prompt_cache(model)
        model(mx.array([TOKENS.tolist()]), cache=cache)
        before = disks(model, disk)
        before.save(TOKENS, cache, trimmable=True)
        assert before.settle(scaled(SECONDS))
        expected = next_logits(model, cache)
    edited = np.append(TOKENS[: len(TOKENS) // 2], [3, 4])
    with mixed(file, file, ("ggml", "ggml", "ggml"), identity=identity, disk=disk) as model:
        after = disks(model, disk)
        found = after.find(edited, 0)
        assert found is not None
        assert after.recall(*found) is None
        assert after.find(edited, 0) is None
        found = after.find(np.append(TOKENS, [3, 4]), 0)
        assert found is not None
        cache = after.recall(*found) or []
        np.testing.assert_allclose(next_logits(model, cache), expected, atol=1e-5)
