"""A model cut into stages gives the whole model's logits, bit for bit."""

import gc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from node.engines.mlx_layout import inspect
from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy, load_parts, nbytes
from tests.support.tiny import ARCHITECTURES, tiny_config, write_model
from tests.support.wire import over_the_wire
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.errors import StageError

LAYERS = 6
TWO_WAY = [(0, cut, LAYERS) for cut in range(1, LAYERS)]
THREE_WAY = [(0, 1, 3, LAYERS), (0, 2, 5, LAYERS), (0, 1, 2, LAYERS), (0, 4, 5, LAYERS)]
EVERY_LAYER = (0, 1, 2, 3, 4, 5, LAYERS)
CUTS = [*TWO_WAY, *THREE_WAY, EVERY_LAYER]

# Prefill in two chunks, the first within gemma3's window of 16 and the second across its end;
# then 16 decode steps, in which its rotating caches go round.
TOKENS = mx.array([[(7 * i * i + 3) % 200 + 1 for i in range(40)]])
CHUNKS = [TOKENS[:, :13], TOKENS[:, 13:24], *(TOKENS[:, i : i + 1] for i in range(24, 40))]


@dataclass
class Whole:
    """A checkpoint, and the logits of the unsplit model for CHUNKS."""

    path: Path
    quant: str
    logits: list[mx.array]


def whole(path: Path, quant: str = "") -> Whole:
    model = load_lazy(path, quant).model
    cache = make_prompt_cache(model)
    logits = [model(chunk, cache=cache) for chunk in CHUNKS]
    mx.eval(logits)
    return Whole(path, quant, logits)


def split_logits(path: Path, quant: str, bounds: tuple[int, ...]) -> list[mx.array]:
    """Logits through stages that share only the frames that would go over the wire."""
    stages = [stage(path, quant, *ends) for ends in pairwise(bounds)]
    caches = [stage.cache_view.make() for stage in stages]
    logits = []
    for chunk in CHUNKS:
        hidden, extra = stages[0].front(chunk, caches[0])
        mx.eval(hidden, extra)
        for later, cache in zip(stages[1:], caches[1:], strict=True):
            hidden, extra = later.forward(over_the_wire(hidden), cache)
            mx.eval(hidden, extra)
        logits.append(stages[0].final_logits(chunk, over_the_wire(hidden), caches[0]))
    return logits


def stage(path: Path, quant: str, first: int, end: int) -> HollowModel:
    lazy = load_lazy(path, quant)
    return HollowModel(lazy.model, lazy.model_type, first, end)


def assert_identical(got: list[mx.array], wanted: list[mx.array]) -> None:
    same = [mx.array_equal(g, w).item() for g, w in zip(got, wanted, strict=True)]
    assert all(same), f"forward passes that differ: {[i for i, s in enumerate(same) if not s]}"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(write_model(tmp_path_factory.mktemp("model"), tiny_config(request.param)))


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gemma3"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = write_model(tmp_path_factory.mktemp("model"), tiny_config(request.param))
    return whole(path, "q4")


@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_logits_are_those_of_the_unsplit_model(model: Whole, bounds: tuple[int, ...]) -> None:
    assert_identical(split_logits(model.path, "", bounds), model.logits)


@pytest.mark.parametrize("bounds", [(0, 3, LAYERS), (0, 1, 4, LAYERS)], ids=str)
def test_logits_of_a_model_quantized_on_load(quantized: Whole, bounds: tuple[int, ...]) -> None:
    assert_identical(split_logits(quantized.path, "q4", bounds), quantized.logits)


def test_logits_of_bfloat16_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("gemma3"))
    file = str(path / "model.safetensors")
    stored: Any = mx.load(file)
    weights = {name: array.astype(mx.bfloat16) for name, array in stored.items()}
    mx.eval(weights)
    mx.save_safetensors(file, weights, {"format": "mlx"})

    split = split_logits(path, "", (0, 1, 4, LAYERS))

    assert split[0].dtype == mx.bfloat16
    assert_identical(split, whole(path).logits)


def test_batches_of_prompts(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("gemma3"))
    tokens = mx.concatenate([TOKENS, TOKENS[:, ::-1]])
    wanted = load_lazy(path).model(tokens)
    first, last = stage(path, "", 0, 2), stage(path, "", 2, LAYERS)

    cache = first.cache_view.make()
    hidden, _ = first.front(tokens, cache)
    hidden, _ = last.forward(hidden, last.cache_view.make())

    assert mx.array_equal(first.final_logits(tokens, hidden, cache), wanted)


def test_a_stage_holds_the_weights_of_its_layers_alone(model: Whole) -> None:
    layers = stage(model.path, "", 2, 4).model.layers

    resident = [nbytes(layer) for layer in layers]
    assert resident == [0, 0, *inspect(whole_directory(model.path)).layer_bytes[2:4], 0, 0]


def test_loading_a_stage_needs_no_more_memory_than_the_stage(tmp_path: Path) -> None:
    config = tiny_config("llama") | {"hidden_size": 256, "intermediate_size": 1024}
    path = write_model(tmp_path, config)
    layout = inspect(whole_directory(path))
    gc.collect()  # models of earlier tests are garbage in cycles
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    cut = stage(path, "", 2, 4)
    for _ in load_parts(cut.layers):
        pass

    grown = mx.get_peak_memory() - before
    size = sum(layout.layer_bytes[2:4])
    assert size <= grown <= size + 2**16  # rounded up, array by array


def test_a_layer_remains_what_it_was(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("gemma3"))
    real = load_lazy(path).model.layers

    cut = stage(path, "", 2, 4).model.layers

    assert [type(layer).__name__ for layer in cut] == [type(layer).__name__ for layer in real]
    assert all(isinstance(c, type(r)) for c, r in zip(cut, real, strict=True))


@pytest.mark.parametrize(("first", "end"), [(0, 7), (3, 3), (4, 2), (-1, 2)])
def test_a_cut_outside_the_model_is_refused(tmp_path: Path, first: int, end: int) -> None:
    path = write_model(tmp_path, tiny_config("llama"))

    with pytest.raises(StageError, match=f"llama: no layers {first} to {end} in a model of 6"):
        stage(path, "", first, end)


class Toy(nn.Module):
    """Four layers; `order` says which run and `shared` which use the first one's cache."""

    def __init__(self, order: list[int], shared: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = [ToyLayer() for _ in range(4)]
        self._order, self._shared = order, shared

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        hidden = self.embed(inputs)
        for index in self._order:
            hidden = self.layers[index](hidden, cache[0 if index in self._shared else index])
        return self.embed.as_linear(hidden)

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def __call__(self, hidden: mx.array, cache: KVCache) -> mx.array:
        keys = hidden[:, None]
        cache.update_and_fetch(keys, keys)
        return hidden + self.project(hidden)


def test_layers_that_run_once_each_can_be_cut() -> None:
    assert HollowModel(Toy([0, 1, 2, 3]), "toy", 1, 3).layer_count == 4


@pytest.mark.parametrize(
    "order",
    [[0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [3, 2, 1, 0], [0, 1, 3]],
    ids=["twice", "each twice", "backwards", "one left out"],
)
def test_layers_that_run_otherwise_are_refused_by_name(order: list[int]) -> None:
    with pytest.raises(StageError, match="toy: its layers don't run once each and in order"):
        HollowModel(Toy(order), "toy", 0, 2)


def test_layers_that_share_a_cache_are_refused() -> None:
    with pytest.raises(StageError, match=r"toy: .* layers 0 and 3 share a cache"):
        HollowModel(Toy([0, 1, 2, 3], shared=(3,)), "toy", 0, 2)
