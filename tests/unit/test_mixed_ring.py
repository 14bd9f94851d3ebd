"""Stages of MLX and of ggml in one ring give what either gives alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from node.ggml.load import open_gguf
from node.ggml.stage_file import Part
from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy
from tests.support.ggml_stages import CHUNKS, Hop, Tiny, make, unsplit
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint
from unicluster.checkpoints.fingerprint import whole

LAYERS = 6


def hollow(path: Path, first: int, end: int) -> HollowModel:
    lazy = load_lazy(path)
    return HollowModel(lazy.model, lazy.model_type, first, end)


def answered(hop: Hop, given: Any, ops: list[Any]) -> Any:
    frame = hop.serve(np.array(given), 1, *ops)
    tensor = frame.hidden[0].tensor
    return np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Tiny]:
    """One float32 llama, as a checkpoint and as a GGUF."""
    path = write_model(tmp_path / "mlx", tiny_config("llama"))
    file = from_checkpoint(path, tmp_path / "llama.gguf")
    return path, Tiny(file, open_gguf(whole(file)), tmp_path)


def alone(path: Path) -> list[Any]:
    model = load_lazy(path).model
    cache = make_prompt_cache(model)
    return [np.array(model(mx.array([chunk]), cache=cache))[0] for chunk in CHUNKS]


def agree(got: list[Any], wanted: list[Any]) -> None:
    scale = max(float(np.abs(logits).max()) for logits in wanted)
    assert max(np.abs(g - w).max() for g, w in zip(got, wanted, strict=True)) <= 1e-4 * scale


def test_both_engines_agree(both: tuple[Path, Tiny]) -> None:
    path, tiny = both
    (ggml,) = unsplit(tiny.file, [CHUNKS])

    agree(ggml, alone(path))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_head_of_mlx_and_stages_of_ggml(both: tuple[Path, Tiny], cut: int) -> None:
    path, tiny = both
    head = hollow(path, 0, cut)
    last = Hop(tiny, 1, Part(cut, LAYERS, has_lm_head=False, context=256))
    cache, ops, got = head.cache_view.make(), [make()], []
    for chunk in CHUNKS:
        tokens = mx.array([chunk])
        hidden, _ = head.front(tokens, cache)
        back = answered(last, hidden, ops)
        got.append(np.array(head.final_logits(tokens, mx.array(back), cache))[0])
        ops = []

    agree(got, alone(path))
    agree(got, unsplit(tiny.file, [CHUNKS])[0])


def test_a_head_of_ggml_and_a_stage_of_mlx(both: tuple[Path, Tiny]) -> None:
    path, tiny = both
    head = Hop(tiny, 0, Part(0, 2, has_lm_head=False, context=256))
    middle = hollow(path, 2, 4)
    last = Hop(tiny, 2, Part(4, LAYERS, has_lm_head=True, context=256))
    cache, ops, got = middle.cache_view.make(), [make()], []
    for chunk in CHUNKS:
        hidden = answered(head, np.array([chunk], np.uint32), ops)
        handed, _ = middle.forward(mx.array(hidden), cache)
        got.append(answered(last, handed, ops)[0])
        ops = []

    agree(got, alone(path))
    agree(got, unsplit(tiny.file, [CHUNKS])[0])


def test_a_stage_of_mlx_keeps_its_dtype_behind_one_of_ggml(tmp_path: Path) -> None:
    model = load_lazy(write_model(tmp_path, tiny_config("llama"))).model
    model.set_dtype(mx.bfloat16)
    last = HollowModel(model, "llama", 4, LAYERS, has_lm_head=True)
    cache = last.cache_view.make()

    logits, _ = last.forward_logits(mx.ones((1, 3, 64), mx.float32), cache)

    assert logits.dtype == cache[0].keys.dtype == mx.bfloat16
