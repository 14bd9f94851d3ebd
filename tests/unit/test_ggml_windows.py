"""Layers with windows can be trimmed: what a window has passed is still there behind a trim."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.layers import Layers, Sizes
from node.ggml.load import open_gguf
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError

LONG, SHORT, OTHER = 100, 30, 60
SEQUENCE, BUSY, FRESH, COPY = range(4)


@pytest.fixture(scope="module", params=["gemma3", "gpt-oss", "llama"])
def layers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Layers]:
    file = write_gguf(tmp_path_factory.mktemp("windows") / "model.gguf", request.param, 6)
    gguf = open_gguf(whole(file))
    sizes = Sizes(
        layers=gguf.layers,
        hidden=gguf.hidden_size,
        cells=512,
        vocabulary=gguf.vocabulary,
        exact=True,
        threads=1,
    )
    loaded = Layers(file, sizes)
    yield loaded
    loaded.close()


def rows(first: int, end: int, width: int) -> Any:
    """Hidden states of positions [first, end), the same in each call."""
    return np.random.default_rng(1).standard_normal((LONG, width), np.float32)[first:end]


def fed(layers: Layers, sequence: int, first: int, end: int) -> Any:
    hidden = rows(first, end, layers.sizes.hidden)
    return layers.forward(hidden, range(first, end), [sequence] * (end - first), wanted=True)


def others_come_and_go(layers: Layers) -> None:
    """So that llama.cpp looks for free cells among those that are in use."""
    for _ in range(2):
        layers.trim(BUSY, 0)
        fed(layers, BUSY, 0, OTHER)


def assert_near(logits: Any, expected: Any) -> None:
    """Sums over the same cells in another order differ a little."""
    np.testing.assert_allclose(logits, expected, atol=2e-3)


def test_a_sequence_is_trimmed_behind_its_window(layers: Layers) -> None:
    for each in (SEQUENCE, BUSY, FRESH, COPY):
        layers.trim(each, 0)
    fed(layers, SEQUENCE, 0, LONG)
    layers.copy(SEQUENCE, COPY, LONG)
    layers.trim(COPY, 0)
    others_come_and_go(layers)

    assert layers.shortest(SEQUENCE) == 0
    layers.trim(SEQUENCE, SHORT)
    behind = fed(layers, SEQUENCE, SHORT, SHORT + 1)

    fed(layers, FRESH, 0, SHORT)
    assert_near(behind, fed(layers, FRESH, SHORT, SHORT + 1))


def test_of_a_saved_sequence_only_the_window_is_there(layers: Layers) -> None:
    for each in (SEQUENCE, BUSY, FRESH, COPY):
        layers.trim(each, 0)
    fed(layers, SEQUENCE, 0, LONG - 1)
    least = layers.shortest(SEQUENCE, saved=True)
    state = layers.state(SEQUENCE)
    layers.trim(SEQUENCE, 0)
    layers.restore(SEQUENCE, state)
    others_come_and_go(layers)

    assert layers.shortest(SEQUENCE) == least
    if least:
        with pytest.raises(StageError, match="can't be trimmed"):
            layers.trim(SEQUENCE, least - 1)
        with pytest.raises(StageError, match="can't be trimmed"):
            layers.copy(SEQUENCE, COPY, SHORT)
    layers.trim(SEQUENCE, max(least, SHORT))
    behind = fed(layers, SEQUENCE, max(least, SHORT), LONG)

    fed(layers, FRESH, 0, max(least, SHORT))
    assert_near(behind, fed(layers, FRESH, max(least, SHORT), LONG))


def test_steps_behind_a_window_can_be_taken_back_one_by_one(layers: Layers) -> None:
    for each in (SEQUENCE, BUSY, FRESH, COPY):
        layers.trim(each, 0)
    fed(layers, FRESH, 0, SHORT)
    expected = [fed(layers, FRESH, at, at + 1) for at in range(SHORT, LONG - 4)]
    fed(layers, SEQUENCE, 0, SHORT)
    for at, one in zip(range(SHORT, LONG - 4), expected, strict=True):
        for guess in range(at, at + 4):
            fed(layers, SEQUENCE, guess, guess + 1)
        others_come_and_go(layers)
        layers.trim(SEQUENCE, at)
        assert_near(fed(layers, SEQUENCE, at, at + 1), one)
