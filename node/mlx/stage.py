"""A stage of MLX: mlx-lm's caches of its layers, and the forward of a hollow model."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx

from node.mlx.cache_view import revive, save
from node.mlx.compat_caches import Caches, token_count
from node.mlx.hollow import HollowModel
from node.mlx.kv_quant import quantized
from node.mlx.memory import give_all_back, give_back
from node.mlx.prebuilt import Build, Kind, PrebuiltStep, StepBuilder, kind_of_leaves
from node.mlx.rollback import restore, snapshot
from node.mlx.saved.state import BITS, GROUP_SIZES, cache_from_state, check_alike
from node.mlx.tensors import decode_tree, encode_tree
from node.prefixes.saved import SavedEntry
from node.ring.bounds import FrameError
from node.ring.cache_engine import Extent
from node.ring.frame_server import FrameServer
from node.ring.stage_input import check_indexes
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, CacheState

if TYPE_CHECKING:
    from node.ring.cache_engine import Leaves


class StageCache:
    """The caches of a stage's layers.

    kind: of the last decode step's input; empty after anything else. step: the next decode step,
    if it was prebuilt.
    """

    def __init__(self, entries: Caches) -> None:
        self.entries = entries
        self.kind: Kind = ()
        self.step: PrebuiltStep | None = None
        self.unchecked: set[int] = set()  # stored entries that no forward has confirmed yet


class MLXStage(FrameServer[StageCache, Any]):
    """Serves frames over one hollow model. All calls come from one thread.

    A deferred result is the output of the last layer: an array, or a tree of arrays.
    """

    engine: ClassVar[str] = "mlx"

    def __init__(self, hollow: HollowModel, *, prebuilt: bool = True) -> None:
        """`prebuilt`: decode steps are built before their input arrives."""
        self._hollow = hollow
        self._run = hollow.forward_logits if hollow.has_lm_head else hollow.forward
        self._step_builder = StepBuilder(prebuilt)
        self._input = hollow.stage_input

    def extent(self, hidden: "Leaves") -> tuple[int, int]:
        return self._input.extent(hidden)

    def check_positions(self, hidden: "Leaves", tokens: int) -> None:
        check_indexes(hidden, tokens)

    def forward(self, cache: StageCache, hidden: "Leaves", *, prefill: bool) -> bool:
        kind = () if prefill else kind_of_leaves(hidden)
        step, cache.step = cache.step, None
        if step is not None and step.kind == kind:
            step.placeholder.fill(hidden)
            cache.entries = step.shadows
            result, extra = step.result, step.extra
        else:
            step = None  # it references the caches' arrays, and MLX would copy them
            result, extra = self._computed(self._run, hidden, cache)
        del hidden[:]
        encode_tree(result, hidden, extra)
        again = bool(kind) and cache.kind == kind
        cache.kind = kind
        return again

    def hold(self, cache: StageCache, hidden: "Leaves") -> Any:
        # Nobody may ever read the result of a prefill chunk, so only the caches are computed.
        self.touch(cache)
        result, extra = self._computed(self._hollow.forward, hidden, cache)
        del hidden[:]
        mx.eval(_states(cache), extra)
        return result

    def claim(self, deferred: Any, hidden: "Leaves") -> None:
        encode_tree(self._hollow.logits(deferred) if self._hollow.has_lm_head else deferred, hidden)

    def prebuild(self, cache: StageCache) -> None:
        if cache.kind and cache.step is None:
            cache.step = self._step_builder.build(cache.kind, cache.entries, self._run)

    def tidy(self, *, freed: bool, prefill: bool) -> None:
        if freed:
            give_all_back()
        elif prefill:
            give_back()

    def touch(self, cache: StageCache) -> None:
        """Drops the prebuilt step, which would miss the change."""
        cache.kind, cache.step = (), None

    def make(self) -> StageCache:
        return StageCache(self._hollow.cache_view.make())

    def merge(self, sources: Sequence[StageCache]) -> StageCache:
        rows = list(zip(*(source.entries for source in sources), strict=True))
        if any(type(row[0]).__name__.startswith("Batch") for row in rows):
            raise FrameError("a source is a batch already")
        return _derived([row[0].merge(list(row)) for row in rows], *sources)

    def filter(self, cache: StageCache, rows: Sequence[int]) -> None:
        for entry in cache.entries:
            entry.filter(list(rows))

    def extend(self, cache: StageCache, other: StageCache) -> None:
        for entry, more in zip(cache.entries, other.entries, strict=True):
            entry.extend(more)
        cache.unchecked |= other.unchecked

    def extract(self, cache: StageCache, row: int) -> StageCache:
        extracted = _derived([entry.extract(row) for entry in cache.entries], cache)
        mx.eval(_states(extracted))  # else it would hold on to the whole batch
        return extracted

    def prepare(self, cache: StageCache, padding: CacheOp.Prepare) -> None:
        named = {
            "left_padding": list(padding.left_padding),
            "lengths": list(padding.lengths),
            "right_padding": list(padding.right_padding),
        }
        for entry in cache.entries:
            entry.prepare(**{name: values for name, values in named.items() if values})

    def finalize(self, cache: StageCache) -> None:
        for entry in cache.entries:
            entry.finalize()
        mx.eval(_states(cache))

    def trim(self, cache: StageCache, tokens: int) -> None:
        for entry in cache.entries:
            entry.trim(tokens)

    def copy(self, cache: StageCache) -> StageCache:
        return _derived(copy.deepcopy(cache.entries), cache)

    def free(self, cache: StageCache) -> None:
        """Nothing: the garbage collector frees it."""

    def query(self, cache: StageCache) -> CacheAnswer:
        return CacheAnswer(
            trimmable=self.trimmable(cache),
            size=self.size(cache),
            nbytes=sum(entry.nbytes for entry in cache.entries),
            empty=all(entry.empty() for entry in cache.entries),
            entries=len(cache.entries),
        )

    def fetch(self, cache: StageCache, entry: int, into: CacheState) -> None:
        saved = cache.entries[entry]
        into.kind = type(saved).__name__
        encode_tree(saved.state, into.state)

    def store(self, cache: StageCache, entry: int, kind: str, state: "Leaves") -> Extent:
        made, extent = cache_from_state(
            self._hollow.cache_view.make()[entry], kind, decode_tree(state)
        )
        cache.entries[entry] = made
        cache.unchecked.add(entry)
        return extent

    def save(self, cache: StageCache) -> list[SavedEntry]:
        return save(cache.entries)

    def revive(self, entries: Sequence[SavedEntry]) -> tuple[StageCache, Extent]:
        made, extent = revive(self._hollow.cache_view.make(), entries)
        cache = StageCache(made)
        cache.unchecked.update(range(len(made)))
        return cache, extent

    def quantize(self, cache: StageCache, bits: int, group_size: int) -> StageCache:
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise FrameError(f"{bits} bits in groups of {group_size}, not {BITS} in {GROUP_SIZES}")
        made = _derived(quantized(copy.deepcopy(cache.entries), bits, group_size), cache)
        mx.eval(_states(made))
        return made

    def snapshot(self, cache: StageCache, *, single: bool = False) -> StageCache:
        return _derived(snapshot(cache.entries, single=single), cache)

    def restore(
        self,
        cache: StageCache,
        snapshot: StageCache,
        tokens: int,
        later: Sequence[StageCache] = (),
    ) -> None:
        restore(cache.entries, snapshot.entries, tokens, [each.entries for each in later])
        cache.unchecked |= snapshot.unchecked

    def entries(self, cache: StageCache) -> int:
        return len(cache.entries)

    def trimmable(self, cache: StageCache, tokens: int = 0) -> bool:
        return all(entry.is_trimmable() for entry in cache.entries)

    def size(self, cache: StageCache) -> int:
        """Tokens in a cache, as far as the entries count them: state-space caches don't."""
        return max(map(token_count, cache.entries), default=0)

    def _computed(self, run: Build, hidden: "Leaves", cache: StageCache) -> tuple[Any, list[Any]]:
        tree = decode_tree(hidden)
        if cache.unchecked:
            fresh = self._hollow.cache_view.make()
            run(tree, fresh)  # nothing is evaluated: the shapes of what it makes are enough
            for index in cache.unchecked:
                check_alike(cache.entries[index], fresh[index])
            cache.unchecked.clear()
        return run(tree, cache.entries)


def _derived(entries: Caches, *sources: StageCache) -> StageCache:
    """A cache made of others."""
    made = StageCache(entries)
    made.unchecked = set().union(*(source.unchecked for source in sources))
    return made


def _states(cache: StageCache) -> list[Any]:
    return [entry.state for entry in cache.entries]
