"""A stage's short list of caches, seen by the model's forward as the full list."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from node.mlx.compat_caches import Caches, count_tokens, interchangeable_kind, make_counter
from node.mlx.saved.growing import by_tokens
from node.mlx.saved.state import cache_from_state
from node.mlx.tensors import save_trees, saved_tree
from node.prefixes.saved import SavedEntry
from node.ring.bounds import FrameError
from node.ring.cache_engine import Extent
from unicluster.errors import in_one_line


class CacheView:
    """The caches that a stage keeps, and the full list made up of them.

    Forward code takes masks and offsets from the first cache of a kind, wherever that
    layer lives. So an entry that lives elsewhere is shown as a cache of this stage of the
    same kind, or, where it has none, as a ghost: a real cache fed one zero byte a token.
    """

    def __init__(
        self, fresh: Callable[[], Caches], owned: Sequence[int], copies: Sequence[int] = ()
    ) -> None:
        """owned: the entries of the stage's layers. copies: those of earlier layers they read."""
        kinds = [interchangeable_kind(cache) for cache in fresh()]
        real = [*owned, *copies]
        position: dict[Any, int] = {}
        for slot, index in enumerate(real):
            position.setdefault(kinds[index], slot)
        ghosts: list[int] = []
        for index, kind in enumerate(kinds):
            if kind not in position:
                position[kind] = len(real) + len(ghosts)
                ghosts.append(index)
        self.fresh = fresh  # of the whole model
        self._members = [*real, *ghosts]
        self._real = len(real)
        self._slots = [position[kind] for kind in kinds]
        for slot, index in enumerate(real):
            self._slots[index] = slot

    def __len__(self) -> int:
        return len(self._members)

    def make(self) -> Caches:
        """New, empty caches: those of the stage's layers, copies of others, then its ghosts."""
        caches = self.fresh()
        made = [caches[index] for index in self._members]
        for ghost in made[self._real :]:
            make_counter(ghost)
        return made

    def full(self, caches: Caches) -> Caches:
        """The list that the model's forward expects, one entry a layer or so."""
        return [caches[slot] for slot in self._slots]

    def advance(self, caches: Caches, batch: int, tokens: int) -> list[mx.array]:
        """Advances the ghosts by `tokens`; returns their arrays, which the caller evaluates."""
        ghosts = caches[self._real :]
        for ghost in ghosts:
            count_tokens(ghost, batch, tokens)
        return [ghost.state for ghost in ghosts]


def save(caches: Caches) -> list[SavedEntry]:
    """The states of caches for a file, which share their memory until the caches are written to."""
    trees = save_trees([cache.state for cache in caches])
    pairs = zip(caches, trees, strict=True)
    return [SavedEntry(type(cache).__name__, by_tokens(cache, leaves)) for cache, leaves in pairs]


def revive(fresh: Caches, entries: Sequence[SavedEntry]) -> tuple[Caches, Extent]:
    """Caches of saved states, in place of fresh ones of their layers, and the largest extent.

    Raises FrameError where they are of others.
    """
    if len(entries) != len(fresh):
        raise FrameError(f"{len(entries)} saved caches for {len(fresh)} layers")
    made, extents = [], []
    for cache, entry in zip(fresh, entries, strict=True):
        try:
            revived, extent = cache_from_state(cache, entry.kind, saved_tree(entry.leaves))
        except FrameError:
            raise
        except Exception as error:  # MLX's are of many kinds
            raise FrameError(f"a saved {entry.kind}: {in_one_line(error)}") from error
        made.append(revived)
        extents.append(extent)
    rows = {extent.rows for extent in extents if extent.rows is not None}
    if len(rows) > 1:
        raise FrameError(f"saved caches of {sorted(rows)} rows")
    return made, Extent(next(iter(rows), None), max((e.tokens for e in extents), default=0))
