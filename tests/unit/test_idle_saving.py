"""Saving of cached prefixes while no answer runs: which of them, and how often."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from node.pipeline.disk_prefixes import DiskPrefixes
from node.pipeline.idle_saving import IdleSaving
from node.prefixes.folder import TOKENS
from node.prefixes.saved import Array
from node.prefixes.workload import Workload
from tests.support.deadlines import scaled
from tests.support.prefixes import files_in, index_in

SIZES = (107, 106, 105, 104, 103, 102, 101, 100)  # the last one was used last


@dataclass
class Cached:
    """A cache in memory of the first `count` tokens of one text."""

    count: int
    trimmable: bool = True
    tokens: Array = field(init=False)
    cache: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = np.arange(self.count)
        cache = KVCache()
        cache.update_and_fetch(*(mx.zeros((1, 1, self.count, 4)) for _ in range(2)))
        self.cache = [cache]


class Counting(DiskPrefixes):
    """Prefixes on disk, which count how many were saved."""

    saves = 0

    def save(self, *args: Any, **options: Any) -> None:
        self.saves += 1
        super().save(*args, **options)


@pytest.mark.parametrize(("trimmable", "saves"), [(True, 1), (False, len(SIZES))])
def test_what_a_longer_one_covers_is_not_saved_beside_it(
    trimmable: bool, saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save of a longer one makes those that it covers of no use: none is saved again."""
    monkeypatch.setattr("node.pipeline.idle_saving.IDLE_SECONDS", 0.0)
    index = index_in(tmp_path)
    disk = Counting(SimpleNamespace(make_cache=list), index, 0.0)
    started: list[Any] = []
    prefixes = [Cached(count, trimmable) for count in SIZES]
    idle = IdleSaving(disk, Workload(), prefixes, started.append)

    idle.working()
    idle.resting()
    (work,) = started
    work()

    assert disk.saves == saves
    assert disk.settle(scaled(60.0))
    assert len(files_in(tmp_path, TOKENS)) == saves
    assert disk.find(np.arange(200), 0) is not None
    index.store.close()


def test_what_is_saved_again_is_not_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_in(tmp_path)
    disk = DiskPrefixes(SimpleNamespace(make_cache=list), index, 0.0)
    short, longer, other = Cached(100), Cached(101), Cached(90)
    other.tokens = other.tokens + 1
    for each in (short, longer, short):
        disk.save(each.tokens, each.cache, trimmable=True)

    monkeypatch.setattr("node.pipeline.disk_prefixes.MOST_COVERED", 0)
    disk.save(other.tokens, other.cache, trimmable=True)

    assert disk.settle(scaled(60.0))
    index.store.close()
    left = index_in(tmp_path)
    assert {name for name, _ in left.store.tokens()} == {
        index.name_of(each.tokens, disk._ring).hex() for each in (short, longer, other)
    }
    left.store.close()
