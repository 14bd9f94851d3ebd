"""Graphs that llama.cpp keeps are computed without a question about each tensor, bit for bit."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml import layers as loading
from node.ggml import tap
from node.ggml.layers import CPU_STEP, Layers
from node.ggml.library import Tensor, tensor_name
from node.ggml.load import load
from node.ggml.repeated import Backend, Repeated, overwrites_itself
from node.ggml.stage_file import Part, stage_file
from tests.support.ggml_stages import Tiny
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError

# One has its input put in behind llama.cpp's scaling, in all its stages; the other none.
ARCHITECTURES = ("llama", "glm4moe")
# Tokens of steps: alike again and again, several graphs at once, and shapes that alternate.
STEPS = (1, 1, 1, 2 * CPU_STEP, CPU_STEP, CPU_STEP, 1, 1, 7, 7, 1, 7, 3 * CPU_STEP, CPU_STEP, 1, 1)


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Tiny:
    return Tiny.make(tmp_path, request.param)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each graph that was computed again."""
    noted: list[int] = []
    before = Repeated.compute

    def compute(repeated: Repeated, *arguments: Any) -> int:
        noted.append(1)
        return before(repeated, *arguments)

    monkeypatch.setattr(Repeated, "compute", compute)
    return noted


def layers(tiny: Tiny, first: int, end: int) -> Layers:
    part = Part(first, end, has_lm_head=end == tiny.gguf.layers, context=512, users=2)
    file = stage_file(tiny.gguf, whole(tiny.file), tiny.folder / "stages", part)
    loaded: Layers = load(tiny.gguf, tiny.folder, file, part).stage._layers
    return loaded


def outputs(stage: Layers, steps: tuple[int, ...] = STEPS) -> Iterator[Any]:
    at, rng = 0, np.random.default_rng(0)
    for tokens in steps:
        inputs = rng.standard_normal((tokens, stage.blank(1).shape[1]), dtype=np.float32)
        yield stage.forward(inputs, range(at, at + tokens), [0] * tokens, wanted=True)
        at += tokens


@pytest.mark.parametrize("bounds", [(1, 3), (3, 6)])
def test_numbers_are_those_of_graphs_that_are_asked_about(
    tiny: Tiny, computed: list[int], monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int]
) -> None:
    repeating = list(outputs(layers(tiny, *bounds)))
    repeated = len(computed)
    monkeypatch.setattr(loading, "can_repeat", lambda: False)

    asked = list(outputs(layers(tiny, *bounds)))

    assert len(computed) == repeated  # none without
    # A last stage of llama.cpp's usual kind has nothing to be asked about.
    assert repeated >= 5 or (tiny.gguf.header.architecture, bounds) == ("llama", (3, 6))
    assert all(map(np.array_equal, repeating, asked))


def test_of_a_graph_that_is_computed_again_no_tensor_s_name_is_looked_at(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = layers(tiny, 1, 3)
    asked: list[int] = []

    def noted(at: int) -> bytes:
        asked.append(at)
        return tensor_name(at)

    monkeypatch.setattr(tap, "tensor_name", noted)
    counts = [len(asked) for _ in outputs(stage, (1, 1, 1, 1))]

    assert counts[0] > 20
    assert counts == [counts[0]] * 4


def test_a_graph_that_can_t_be_computed_is_an_error_and_no_old_result(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = layers(tiny, 1, 3)
    list(outputs(stage, (1, 1, 1)))
    monkeypatch.setattr(Backend, "compute", lambda backend, graph: -1)

    with pytest.raises(StageError, match=r"failed to compute a graph \(status -1\)"):
        stage.forward(stage.blank(1), [3], [0], wanted=True)


def test_a_node_that_overwrites_its_source_is_not_computed_twice() -> None:
    numbers = np.zeros(8, np.float32)
    source, node = Tensor(), Tensor()
    for tensor in (source, node):
        tensor.ne[:] = [4, 1, 1, 1]
        tensor.nb[:] = [4, 16, 16, 16]
        tensor.data = numbers.ctypes.data
    node.src[0] = ctypes.addressof(source)

    assert overwrites_itself(ctypes.addressof(node))
    node.data = numbers.ctypes.data + 16
    assert not overwrites_itself(ctypes.addressof(node))
