"""`unicluster plan`, `models` and `hardware` as a person runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.models.catalog import entries
from coordinator.models.inspect_child import layouts
from coordinator.models.question import ask
from tests.support.cluster import ROOT
from tests.support.command import run_here
from tests.support.deadlines import scaled
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint, write_gguf
from unicluster.units import format_bytes


def planned(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_here("plan", *words, "--json").out)
    return found


KEYS = [
    *("model", "quant", "context", "users", "objective", "fits", "stages", "total_weight_bytes"),
    *("layer_bytes", "embed_bytes", "head_bytes", "kv_bytes_per_layer", "predicted"),
    *("shortfall_bytes", "suggestions"),
]


def test_deepseek_fits_one_large_mac_and_stays_there() -> None:
    found = planned("deepseek-r1", "--fleet", "2x mac-studio-m3-ultra-512")

    assert list(found) == KEYS
    assert (found["model"], found["quant"], found["fits"]) == ("deepseek-r1", "q4", True)
    assert [stage["layers"] for stage in found["stages"]] == [[0, 61]]
    total = sum(found["layer_bytes"]) + found["embed_bytes"] + found["head_bytes"]
    assert total == found["total_weight_bytes"] == found["stages"][0]["weight_bytes"]


def test_what_does_not_fit_exits_with_3_and_says_what_would_do() -> None:
    words = ("deepseek-r1", "--quant", "q8", "--fleet", "4x framework-desktop-128")
    done = run_here("plan", *words, "--json")
    found = json.loads(done.out)

    assert done.code == 3
    assert list(found) == KEYS
    assert not found["fits"]
    assert found["shortfall_bytes"] > 0
    assert "--quant q4" in found["suggestions"]
    again = run_here("plan", "deepseek-r1", "--quant", "q4", "--fleet", "4x framework-desktop-128")
    assert again.code == 0


@pytest.mark.sweep
def test_the_machines_suggested_are_enough() -> None:
    done = run_here("plan", "glm-5", "--fleet", "framework-desktop-128")
    assert done.code == 3
    assert "3x bosgame-m5-128 ($5100)" in done.err

    with_them = run_here("plan", "glm-5", "--fleet", "framework-desktop-128, 3x bosgame-m5-128")
    assert with_them.code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("nonsuch-model", "--fleet", "dgx-spark"),
        ("deepseek-r1", "--fleet", "nonsuch-machine"),
        ("deepseek-r1", "--fleet", "dgx-spark", "--link", "carrier-pigeon"),
        ("gpt-oss-120b", "--quant", "q2", "--fleet", "dgx-spark"),
        ("gemma-3-4b", "--context", "1000000", "--fleet", "dgx-spark"),
        ("qwen3-14b", "--engine", "mlx", "--gguf", "a/b.gguf", "--fleet", "dgx-spark"),
    ],
)
def test_bad_input_exits_with_2_in_one_line(words: tuple[str, ...]) -> None:
    """In a process: nothing else of it may be seen either."""
    done = subprocess.run(
        [sys.executable, "-m", "unicluster", "plan", *words],
        capture_output=True,
        text=True,
        timeout=scaled(60),
    )

    assert done.returncode == 2
    assert done.stderr.startswith("unicluster: ")
    assert done.stderr.count("\n") == 1


def test_a_person_sees_who_holds_what_and_why_not_otherwise() -> None:
    fleet = "mac-studio-m3-ultra-96, mac-studio-m4-max-128, framework-desktop-128"

    shown = run_here("plan", "qwen3-235b-a22b", "--fleet", fleet).out

    for part in ("layers", "hop ms", "bottleneck", "predicted", "Other plans", "longer", "█"):
        assert part in shown
    assert "* " in shown
    assert "assumed: nothing was measured yet" in shown


def test_strix_boxes_beside_a_mac_take_a_hypothetical_gguf() -> None:
    fleet = "2x framework-desktop-128, mac-studio-m3-ultra-512"

    shown = run_here("plan", "kimi-k2", "--fleet", fleet).out
    found = planned("kimi-k2", "--fleet", fleet)
    alone = planned("kimi-k2", "--fleet", fleet, "--engine", "mlx")

    assert [stage["engine"] for stage in found["stages"]] == ["mlx", "ggml", "ggml"]
    assert "(reads 205 GB/s there, MLX 5.1)" in " ".join(shown.split())
    assert "serve it with --gguf" in shown
    assert {stage["engine"] for stage in alone["stages"]} == {"mlx"}
    faster = found["predicted"]["tokens_per_s_single"]
    assert faster > alone["predicted"]["tokens_per_s_single"]


STRIX_BOXES = ("--fleet", "8x framework-desktop-128", "--engine", "ggml", "--context", "4096")


def test_models_that_the_readme_names_run_on_strix_boxes() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    words = set(re.findall(r"[\w.-]+", text)) - {"demo"}
    named = sorted(entry.id for entry in entries() if words & {entry.id, *entry.aliases})

    assert named
    for name in named:
        assert {stage["engine"] for stage in planned(name, *STRIX_BOXES)["stages"]} == {"ggml"}


def test_room_on_disks_for_stages_of_a_gguf_is_said() -> None:
    words = ("deepseek-r1", "--fleet", "4x framework-desktop-128", "--context", "4096")

    shown = " ".join(run_here("plan", *words, "--engine", "ggml").out.split())

    for stage in planned(*words, "--engine", "ggml")["stages"]:
        assert f"{stage['node']} {format_bytes(stage['weight_bytes'])}" in shown
    assert "for stages, beside the model's files; hardly any on btrfs, XFS" in shown
    assert "beside the model's files" not in run_here("plan", *words, "--engine", "mlx").out


def test_how_far_a_recurrent_model_can_be_rolled_back_is_said() -> None:
    fleet = ("--fleet", "2x framework-desktop-128", "--context", "4096", "--speculate", "lookup")

    ggml = " ".join(run_here("plan", "qwen3-next", *fleet, "--engine", "ggml").out.split())
    mlx = " ".join(run_here("plan", "qwen3-next", *fleet, "--engine", "mlx").out.split())

    assert "reuse of recurrent layers only whole copies, kept where messages begin and" in ggml
    assert "guessing" not in ggml
    assert "reuse a cached prompt only as a whole, because of recurrent layers" in mlx


@pytest.mark.sweep
def test_every_catalogue_model_is_planned_on_strix_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layouts at once, because most of each is imports."""
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    layouts([request for e in entries() for request in ask(e.id, None, 4096, 1).requests])

    for entry in entries():
        found = json.loads(run_here("plan", entry.id, *STRIX_BOXES, "--json", home=tmp_path).out)

        assert found["fits"], entry.id
        assert {stage["engine"] for stage in found["stages"]} == {"ggml"}, entry.id


def test_a_gguf_of_ones_own_is_planned_beside_its_model(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")
    path = write_model(tmp_path / "mine", tiny_config("llama"))
    file = from_checkpoint(path, tmp_path / "mine.gguf")
    asked = (str(path), "--fleet", "framework-desktop-128", "--context", "512")

    both = planned(*asked, "--gguf", str(file))
    other = run_here("plan", *asked, "--gguf", str(write_gguf(tmp_path / "other.gguf", layers=4)))

    assert [stage["engine"] for stage in both["stages"]] == ["ggml"]
    assert other.code == 2
    assert "it is another model: it has 4 layers, and mine 6" in other.err


def test_a_config_file_of_ones_own_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(tiny_config("llama")))

    found = planned(str(path), "--fleet", "dgx-spark", "--context", "512")

    assert (found["model"], found["quant"], found["context"]) == ("mine", "float32", 512)


def test_without_a_cluster_a_fleet_is_asked_for(tmp_path: Path) -> None:
    done = run_here("plan", "demo", home=tmp_path)

    assert done.code != 0
    assert "this machine is in no cluster" in done.err


def test_the_catalogues_are_listed() -> None:
    models, hardware = run_here("models").out, run_here("hardware", "--sources").out

    assert "deepseek-r1" in models
    assert "378" in models
    assert "mac-studio-m3-ultra-512" in hardware
    assert "Apple, Mac Studio" in hardware
