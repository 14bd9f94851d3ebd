"""Buffers that llama.cpp computes in: asked before a plan is made, and what they really are."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from coordinator.planning.placement import Layout
from node.ggml import layout
from node.ggml.cutting.kinds import forbidden_cuts
from node.ggml.load import load, open_gguf
from node.ggml.stage_file import Part, stage_file
from tests.support.any_gguf import derived, save_random
from tests.support.ggml_stages import Tiny
from tests.support.real_model import MISSING, gguf_file
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError

CONTEXT, USERS = 2048, 2


def real_bytes(tiny: Tiny, *bounds: int) -> list[int]:
    """Of stages that are loaded."""
    found = []
    for first, end in pairwise(bounds):
        part = Part(first, end, end == tiny.gguf.layers, CONTEXT, USERS)
        file = stage_file(tiny.gguf, whole(tiny.file), tiny.folder / "stages", part)
        loaded = load(tiny.gguf, tiny.file.parent, file, part)
        found.append(loaded.workspace_bytes)
        loaded.stage.close()
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen35", "deepseek4"])
def test_no_stage_computes_in_more_than_was_asked_for(tmp_path: Path, architecture: str) -> None:
    file = tmp_path / f"{architecture}.gguf"
    save_random(file, derived(tmp_path, architecture))
    tiny = Tiny(file, open_gguf(whole(file)), tmp_path)
    forbidden = set(forbidden_cuts(tiny.gguf.header))
    cuts = [cut for cut in range(1, tiny.gguf.layers) if cut not in forbidden]

    asked = layout.ask(tiny.gguf, CONTEXT, USERS).workspace_bytes

    for cut in {cuts[0], cuts[len(cuts) // 2], cuts[-1]}:
        assert 0 < max(real_bytes(tiny, 0, cut, tiny.gguf.layers)) <= asked


@pytest.mark.parametrize(
    ("architecture", "recurrent", "window"),
    [("llama", False, 0), ("qwen3next", True, 0), ("gemma3", False, 16)],
)
def test_llama_cpp_says_what_can_be_rolled_back(
    tmp_path: Path, architecture: str, recurrent: bool, window: int
) -> None:
    tiny = Tiny.make(tmp_path, architecture)

    found = layout.inspect(whole(tiny.file), CONTEXT, USERS)

    assert (found.recurrent, found.window) == (recurrent, window)


def test_a_real_model_computes_in_what_was_asked_for(tmp_path: Path) -> None:
    if (real_file := gguf_file()) is None:
        pytest.skip(MISSING)
    tiny = Tiny(real_file, open_gguf(whole(real_file)), tmp_path)
    middle = tiny.gguf.layers // 2

    asked = layout.ask(tiny.gguf, CONTEXT, USERS).workspace_bytes

    real = max(real_bytes(tiny, 0, middle, tiny.gguf.layers))
    assert real <= asked < real + 32 * 2**20  # steps on a GPU are larger


def test_a_model_that_llama_cpp_does_not_take_is_planned_by_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StageError("llama.cpp can't load it")

    tiny = Tiny.make(tmp_path)
    monkeypatch.setattr(layout, "Layers", refuse)

    assert layout.ask(tiny.gguf, CONTEXT, USERS).workspace_bytes == 0


def test_a_plan_keeps_so_much_for_each_stage() -> None:
    small = Layout(
        model_type="llama",
        layer_bytes=(20 * 2**20,) * 4,
        layer_active_bytes=(20 * 2**20,) * 4,
        head_bytes=5_000,
        kv_bytes_per_layer=(2**20,) * 4,
        context=CONTEXT,
        users=USERS,
        hidden_bytes=64,
        quant="q4_0",
        max_context=0,
        workspace_bytes=50 * 2**20,
    )
    large = replace(small, layer_bytes=(10**9,) * 4)
    toy = replace(small, layer_bytes=(10_000,) * 4)

    assert small.reserve(21 * 2**20) == 50 * 2**20
    assert small.capacity(71 * 2**20) == 21 * 2**20
    assert small.capacity(40 * 2**20) == 0
    assert large.reserve(10**10) == large.full_reserve > 256 * 2**20
    assert toy.reserve(16_000) == 1_000  # an empty worker takes more than its buffers
    for each in (small, large):
        for usable in (60 * 2**20, 10**8, 10**10):
            most = each.capacity(usable)
            assert each.needed(most) <= usable < each.needed(most + 1)
