"""Stages of llama.cpp on several devices, which are its CPU under other names."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.library import library_folder
from tests.support.deadlines import scaled
from tests.support.tiny_gguf import write_gguf
from unicluster.program import child_environment, module_command

VULKAN = any(library_folder().glob("*ggml-vulkan*"))
LAYERS = 6
CPU = (("CPU", LAYERS),)
SPLITS = (
    (("Fake1", LAYERS),),
    (("Fake1", 2), ("Fake0", 4)),
    (("Fake0", 5), ("Fake1", 1)),
)
ERRORS = {
    (("Fake7", LAYERS),): "no device Fake7 here any more: it has CPU, Fake0, Fake1",
    (("Fake0", 2), ("Fake1", 2)): "2 devices are given other layers than the 6 here",
    (("Fake0", 2), ("CPU", 4)): "split is of GPUs",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The devices, and what came of each split, all from one process."""
    file = write_gguf(tmp_path_factory.mktemp("split") / "tiny.gguf", "llama", LAYERS)
    splits = [CPU, *SPLITS, *ERRORS]
    command = module_command("tests.support.ggml_devices", str(file), json.dumps(splits))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=scaled(60), env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer | {"answers": dict(zip(splits, answer["answers"], strict=True))}


@pytest.mark.parametrize("split", SPLITS, ids=["one", "the second first", "one layer"])
def test_each_device_gets_its_layers_and_the_last_the_lm_head(
    split: tuple[tuple[str, int], ...], loaded: dict[str, Any]
) -> None:
    answer, alone = loaded["answers"][split], loaded["answers"][CPU]

    wanted = [name for name, layers in split for _ in range(layers)]
    assert answer["placed"] == [*wanted, split[-1][0]]
    assert answer["logits"] == alone["logits"]


def test_the_cpu_is_taken_though_there_are_gpus(loaded: dict[str, Any]) -> None:
    assert loaded["answers"][CPU]["placed"] == ["CPU"] * (LAYERS + 1)


def test_devices_are_listed_with_kind_and_memory(loaded: dict[str, Any]) -> None:
    assert loaded["devices"][:2] == [["Fake0", "gpu", 1 << 30], ["Fake1", "gpu", 2 << 30]]
    assert loaded["devices"][-1][:2] == ["CPU", "cpu"]


@pytest.mark.parametrize(("split", "said"), ERRORS.items())
def test_devices_that_make_no_sense_are_an_error(
    split: tuple[tuple[str, int], ...], said: str, loaded: dict[str, Any]
) -> None:
    assert said in loaded["answers"][split]["error"]


@pytest.mark.skipif(not VULKAN, reason="llama.cpp is built here without Vulkan")
def test_vulkan_in_software_is_in_the_hosts_memory(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", LAYERS)
    splits = json.dumps([CPU, [("Vulkan0", LAYERS)]])
    command = module_command("tests.support.ggml_devices", str(file), splits)
    env = child_environment({"GGML_VK_VISIBLE_DEVICES": "0"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(120), env=env)
    answer = json.loads(done.stdout.splitlines()[-1])
    if "Vulkan0" not in [name for name, _, _ in answer["devices"]]:
        pytest.skip("there is no driver of Vulkan: apt-get install mesa-vulkan-drivers")

    alone, vulkan = answer["answers"]
    assert vulkan["placed"] == ["Vulkan0"] * (LAYERS + 1)
    assert np.allclose(vulkan["logits"], alone["logits"], rtol=1e-2, atol=1e-2)
