"""The prefix cache: which entry a prompt gets, and the order of eviction."""

from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from node.generation.kv_budget import KVBudget
from node.generation.prefix_cache import (
    CHECKPOINT_STEP,
    CHECKPOINTS,
    MIN_TOKENS,
    CachedPrefix,
    PrefixCache,
    branchings,
)
from node.mlx.compat_caches import GROWTH_TOKENS

STORY = list(range(100))


def entry(tokens: list[int], nbytes: int = 10, trimmable: bool = True) -> CachedPrefix:
    return CachedPrefix(np.array(tokens), [], nbytes, trimmable)


def saved(caches: PrefixCache, prompt: list[int]) -> int:
    match = caches.find(prompt)
    return 0 if match is None else match[1]


@pytest.mark.parametrize(
    ("prompt", "trimmable", "tokens"),
    [
        ([*STORY, 1, 2], True, 100),  # the next turn
        ([*STORY, 1, 2], False, 100),
        (STORY, True, 99),  # the last token is always computed
        (STORY, False, 0),
        (STORY[:50] + [7] * 9, True, 50),  # another turn after the same beginning
        (STORY[:50] + [7] * 9, False, 0),
        (STORY[: MIN_TOKENS - 1] + [7] * 9, True, 0),  # not worth a copy
        ([7, *STORY], True, 0),
        ([0], True, 0),
    ],
)
def test_common_prefixes_are_reused(prompt: list[int], trimmable: bool, tokens: int) -> None:
    caches = PrefixCache()
    caches.add(entry(STORY, trimmable=trimmable))

    assert saved(caches, prompt) == tokens


def test_a_longer_cache_replaces_the_shorter_that_it_begins_with() -> None:
    caches = PrefixCache()
    caches.add(entry(STORY[:50]))
    caches.add(entry([*STORY[:50], 1]))
    caches.add(entry(STORY))

    assert len(caches) == 2


def test_one_that_cannot_be_trimmed_replaces_none() -> None:
    caches = PrefixCache()
    caches.add(entry(STORY[:50], trimmable=False))
    caches.add(entry(STORY, trimmable=False))

    assert saved(caches, STORY[:70]) == 50


B, E, R, N = 1000, 1001, 1002, 10  # marks of a message's begin, end and role; a line's end
MARKS = {B, E, R}
SYSTEM, MESSAGE = [5] * 40, [6] * 30


def chatml(*messages: list[int]) -> list[int]:
    return [t for m in messages for t in (B, 20, N, *m, E, N)] + [B, 21, N]


def with_roles(*messages: list[int]) -> list[int]:
    return [t for m in messages for t in (B, 20, R, N, *m, E)] + [B, 21, R, N]


@pytest.mark.parametrize("template", [chatml, with_roles])
def test_prompts_part_before_messages_and_after_the_last_one(template: Any) -> None:
    places = branchings(template(SYSTEM, MESSAGE), MARKS)

    short = branchings(template(SYSTEM, [6, 6]), MARKS)
    begun = len(template(SYSTEM)) - len(template()) - (template is chatml) - 1
    assert places == [begun, begun + len(template(MESSAGE)) - len(template())]
    assert short == [begun]  # between its marks there is too little


def test_only_the_last_messages_have_checkpoints() -> None:
    assert len(branchings(chatml(*[MESSAGE] * 9), MARKS)) == CHECKPOINTS


def test_a_prompt_without_marks_has_some_at_equal_distances() -> None:
    places = branchings([7] * (5 * CHECKPOINT_STEP), MARKS)

    assert places == [CHECKPOINT_STEP * n for n in (2, 3, 4)]
    assert branchings([7] * 100, MARKS) == []


def test_one_that_is_not_the_newest_goes_before_the_newest() -> None:
    caches = PrefixCache()
    caches.add(entry(STORY, trimmable=False))
    caches.add(entry(STORY[:50], trimmable=False), newest=False)

    assert [len(each.tokens) for each in caches.shrink(10)] == [50]


def test_the_least_recently_used_are_evicted_first() -> None:
    caches = PrefixCache()
    for first in (1000, 2000, 3000):
        caches.add(entry(list(range(first, first + 100))))
    caches.find(list(range(1000, 1100)))

    caches.shrink(20)

    assert [saved(caches, list(range(f, f + 100))) for f in (1000, 2000, 3000)] == [99, 0, 99]


@pytest.mark.parametrize(
    ("kinds", "tokens", "share"),
    [
        ([KVCache()], GROWTH_TOKENS, 1 / 16),
        ([KVCache()], GROWTH_TOKENS + 1, 2 / 16),  # caches grow by steps
        ([KVCache()], 16 * GROWTH_TOKENS, 1),
        ([KVCache(), RotatingKVCache(64)], 1, 1),  # a window is soon full
    ],
)
def test_bytes_reserved_for_an_answer(kinds: list[Any], tokens: int, share: float) -> None:
    budget = KVBudget(total=3200, users=2, context=16 * GROWTH_TOKENS, kinds=kinds)

    assert budget.answer_bytes(tokens) == 1600 * share
    assert budget.batch_bytes([1, tokens]) == 2 * 1600 * share
