"""Full windows that are rolled back by what was overwritten."""

import copy
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from node.mlx.rollback import Overwritten, restore, snapshot, windows_fill_at

WINDOW = 8


def step(cache: Any, tokens: int, seed: int) -> list[Any]:
    """Keys and values that attention sees after so many tokens more."""
    keys = mx.random.normal((1, 2, tokens, 4), key=mx.random.key(seed))
    seen = cache.update_and_fetch(keys, keys * 2)
    return [array.tolist() for array in seen]


def a_window(tokens: int, *, keep: int = 0, prompt: int = 5) -> RotatingKVCache:
    cache = RotatingKVCache(max_size=WINDOW, keep=keep)
    step(cache, prompt, 0)
    for number in range(1, tokens - prompt + 1):
        step(cache, 1, number)
    return cache


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("tokens", range(WINDOW - 1, 3 * WINDOW))
@pytest.mark.parametrize("prompt", [1, 5, 2 * WINDOW])
def test_a_window_is_as_if_nothing_had_come(tokens: int, keep: int, prompt: int) -> None:
    cache: list[Any] = [a_window(max(tokens, prompt), keep=keep, prompt=prompt)]
    expected = copy.deepcopy(cache[0])

    saved = []
    for guess in range(5):
        saved.append(snapshot(cache, single=True))
        step(cache[0], 1, 100 + guess)
    restore(cache, saved[2], 3, saved[3:])
    restore(cache, saved[0], 2, saved[1:2])

    for later in range(2 * WINDOW):
        assert step(cache[0], 1, 200 + later) == step(expected, 1, 200 + later)


def test_snapshots_between_which_nothing_was_computed() -> None:
    """A stage has skipped the frames behind the second."""
    cache: list[Any] = [a_window(2 * WINDOW + 3)]
    expected = copy.deepcopy(cache[0])
    saved = []
    for guess in range(4):
        saved.append(snapshot(cache, single=True))
        if guess < 2:
            step(cache[0], 1, 100 + guess)

    restore(cache, saved[0], 2, saved[1:])

    for later in range(2 * WINDOW):
        assert step(cache[0], 1, 200 + later) == step(expected, 1, 200 + later)


def test_only_what_is_overwritten_is_saved_of_a_full_window() -> None:
    full, growing = a_window(2 * WINDOW), a_window(WINDOW - 2)

    saved = snapshot([full, growing, KVCache()], single=True)

    assert isinstance(saved[0], Overwritten)
    assert isinstance(saved[1], RotatingKVCache)
    assert saved[2] is None
    assert isinstance(snapshot([full])[0], RotatingKVCache)


def test_when_no_snapshot_is_a_copy() -> None:
    windows = [RotatingKVCache(max_size=size) for size in (8, 32)]
    assert windows_fill_at([KVCache(), *windows]) == 32
    assert windows_fill_at([KVCache()]) == 0
    assert windows_fill_at([*windows, ArraysCache(2)]) == float("inf")
