"""Handles for caches that live on another machine.

mlx-lm calls the cache protocol on a handle as on any cache. Each call is recorded and travels
with the next frame; the stage replays it on its real caches, in order.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from node.mlx.compat_caches import SAVED_LIST, DeferredState, members
from node.mlx.tensors import decode_tree, encode_tree
from unicluster.cluster.sizes import FRAME_BYTES
from unicluster.v1.stage_pb2 import (
    MAKE,
    THERE,
    CacheAnswer,
    CacheOp,
    CacheState,
    Recalled,
    RecallStep,
    StageReport,
)

# Bytes of a frame beside its largest operation, for other operations and reports.
FRAME_OVERHEAD = 1 << 20
# Of a saved state that takes several frames.
PART_BYTES = 16 << 20


class RemoteStage:
    """The head's book on one remote stage: operations not yet sent, and numbers for caches.

    `ask` sends an operation with what is recorded, at once, and returns that stage's report on
    it. `on_free` is called, on any thread, when something waits that no forward may carry soon.
    """

    def __init__(
        self,
        index: int,
        ask: Callable[["RemoteStage", CacheOp], StageReport],
        on_free: Callable[[], None],
    ) -> None:
        self.index = index
        self.operations: deque[CacheOp] = deque()
        self._numbers = itertools.count(1)
        self._ask = ask
        self._on_free = on_free

    def make(self) -> "RemoteCache":
        """A new, empty cache on the stage."""
        return self.new(make=CacheOp.Make())

    def new(self, **operation: Any) -> "RemoteCache":
        """A handle of the cache that `operation` makes."""
        number = next(self._numbers)
        self.operations.append(CacheOp(cache=number, **operation))
        return RemoteCache(self, number)

    def ask(self, operation: CacheOp) -> StageReport:
        """Sends `operation` with all before it and waits for the stage's report."""
        return self._ask(self, operation)

    def free(self, number: int) -> None:
        """Called by the garbage collector at any moment: takes no lock."""
        self.operations.append(CacheOp(cache=number, free=CacheOp.Free()))
        self._on_free()

    def recall(self, name: bytes, step: "RecallStep.ValueType") -> "Recalled.ValueType":
        """How far the stage is with a prefix on its disk, after a step."""
        operation = CacheOp(recall=CacheOp.Recall(name=name, step=step))
        return self.ask(operation).answer.recalled

    def recall_soon(self, name: bytes, step: "RecallStep.ValueType") -> None:
        """Records a step for the next frame."""
        self.operations.append(CacheOp(recall=CacheOp.Recall(name=name, step=step)))
        self._on_free()

    def recalled(self, name: bytes) -> "RemoteCache | None":
        """The cache of a prefix that the stage has read; None where it can't be made."""
        number = next(self._numbers)
        operation = CacheOp(cache=number, recall=CacheOp.Recall(name=name, step=MAKE))
        made = self.ask(operation).answer.recalled == THERE
        handle = RemoteCache(self, number)  # one that is dropped frees what is there instead
        return handle if made else None

    def unwritten(self) -> int:
        """Bytes of prefixes that the stage has still to write to its disk."""
        return self.ask(CacheOp(query=CacheOp.Query())).answer.unwritten

    def store(self, saved: Any) -> "RemoteCache":
        """Moves a list of caches that is here (SAVED_LIST), one entry a member, to the stage."""
        handle, pending = self.make(), 0
        for entry, member in enumerate(members(saved) or ()):
            operation = CacheOp(cache=handle.number)
            operation.store.entry = entry
            operation.store.kind = type(member).__name__
            encode_tree(member.state, operation.store.state)
            size = operation.ByteSize()
            if size + FRAME_OVERHEAD > FRAME_BYTES:
                self._store_in_parts(operation)
                pending = 0
                continue
            if pending + size + FRAME_OVERHEAD > FRAME_BYTES:
                self.ask(CacheOp(cache=handle.number, query=CacheOp.Query()))
                pending = 0
            pending += size
            self.operations.append(operation)
        return handle

    def _store_in_parts(self, operation: CacheOp) -> None:
        """Sends a Store that is larger than a frame; waits until the stage has it."""
        store = operation.store
        whole = CacheState(kind=store.kind, state=store.state).SerializeToString()
        for start in range(0, len(whole), PART_BYTES):
            end = start + PART_BYTES
            part = CacheOp.Store(entry=store.entry, part=whole[start:end], more=end < len(whole))
            self.ask(CacheOp(cache=operation.cache, store=part))


class RemoteCache:
    """One remote cache, all layers of the stage together, behind mlx-lm's cache protocol."""

    def __init__(self, stage: RemoteStage, number: int) -> None:
        self.stage = stage
        self.number = number
        self._quantized = False
        # Counts what changed the cache, to tell whether a report still holds.
        self._version = 0
        self._seen: tuple[int, StageReport] | None = None
        # What the pipeline expects of its next call; of no use once the cache is changed.
        self.expected: Any = None

    def before_forward(self) -> int:
        """Notes that a forward goes out; returns the version its report will describe."""
        self._version += 1
        return self._version

    def after_forward(self, version: int, report: StageReport) -> None:
        """Keeps the stage's report on the cache after that forward."""
        self._seen = (version, report)

    def merge(self, handles: Sequence["RemoteCache"]) -> "RemoteCache":
        sources = [handle.number for handle in handles]
        return self.stage.new(merge=CacheOp.Merge(sources=sources))

    def filter(self, batch_indices: Any) -> None:
        self._change(filter=CacheOp.Filter(rows=[int(row) for row in batch_indices]))

    def extend(self, other: "RemoteCache") -> None:
        self._change(extend=CacheOp.Extend(other=other.number))

    def extract(self, idx: int) -> "RemoteCache":
        return self.stage.new(extract=CacheOp.Extract(source=self.number, row=idx))

    def prepare(
        self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None
    ) -> None:
        self._change(
            prepare=CacheOp.Prepare(
                left_padding=left_padding, lengths=lengths, right_padding=right_padding
            )
        )

    def finalize(self) -> None:
        self._change(finalize=CacheOp.Finalize())

    def trim(self, n: int) -> int:
        """Trims the last `n` tokens; returns how many were trimmed."""
        trimmed = min(n, self.size())
        self._change(trim=CacheOp.Trim(tokens=trimmed))
        return trimmed

    def roll_back(self, tokens: int) -> None:
        """Trims the last `tokens`, of frames of which a stage may have skipped some; asks nothing.

        The caller knows that the cache can be trimmed.
        """
        self._change(trim=CacheOp.Trim(tokens=tokens, guessed=True))

    def is_trimmable(self) -> bool:
        report = self._current()
        return self._query().trimmable if report is None else report.trimmable

    def size(self) -> int:
        report = self._current()
        return self._query().size if report is None else report.size

    def empty(self) -> bool:
        return self._query().empty

    @property
    def nbytes(self) -> int:
        return self._query().nbytes

    @property
    def state(self) -> Any:
        """The states of the remote caches, fetched only when looked at.

        mlx-lm evaluates the state of every cache after each prefill chunk, and that must cost
        nothing here; saving a prompt cache walks through it, and then it is fetched.
        """
        return DeferredState(self.fetch)

    def fetch(self) -> list[tuple[Any, str]]:
        """Fetches (state, class name) of each cache of the stage, as CacheList has them."""
        fetched = []
        for entry in range(self._query().entries):
            operation = CacheOp(cache=self.number, fetch=CacheOp.Fetch(entry=entry))
            state = self._fetch_entry(operation)
            fetched.append((decode_tree(state.state), state.kind))
        return fetched

    def _fetch_entry(self, operation: CacheOp) -> CacheState:
        """The answer to a Fetch, in parts: it may be larger than a frame."""
        whole = bytearray()
        operation.fetch.most_bytes = PART_BYTES
        while True:
            operation.fetch.offset = len(whole)
            state = self.stage.ask(operation).state
            if not state.total:  # a stage of an older version gives all at once
                return state
            whole += state.part
            if len(whole) >= state.total or not state.part:
                return CacheState.FromString(bytes(whole))

    @property
    def offset(self) -> int:
        """Tokens in it: mlx-lm looks at it before it quantizes a cache."""
        return self.size()

    def to_quantized(self, group_size: int, bits: int) -> "RemoteCache":
        """A copy with its KV caches quantized; the handle itself if they already are.

        Where a head's size is no multiple of `group_size`, the stage takes a smaller one.
        """
        if self._quantized:
            return self
        operation = CacheOp.Quantize(source=self.number, bits=bits, group_size=group_size)
        handle = self.stage.new(quantize=operation)
        handle._quantized = True
        return handle

    def save(self, name: bytes, blocks: Sequence[bytes] = (), *, idle: bool = False) -> None:
        """Has the stage save it on its disk; see CacheOp.Save."""
        save = CacheOp.Save(name=name, blocks=blocks, idle=idle)
        self.stage.operations.append(CacheOp(cache=self.number, save=save))

    def snapshot(self, *, single: bool = False) -> "RemoteCache":
        """A snapshot of the parts that can't be trimmed, for `restore`.

        single: all forwards until then are of one token.
        """
        return self.stage.new(snapshot=CacheOp.Snapshot(source=self.number, single=single))

    def restore(
        self, saved: "RemoteCache", tokens: int, later: Sequence["RemoteCache"] = ()
    ) -> None:
        """Rolls back the `tokens` since `saved` was made.

        later: snapshots made since, in order. All are used up.
        """
        numbers = [each.number for each in later]
        operation = CacheOp.Restore(snapshot=saved.number, tokens=tokens, later=numbers)
        self._change(restore=operation)

    def __deepcopy__(self, memo: Any) -> "RemoteCache":
        handle = self.stage.new(copy=CacheOp.Copy(source=self.number))
        handle._quantized = self._quantized
        return handle

    def __del__(self) -> None:
        self.stage.free(self.number)

    def _change(self, **operation: Any) -> None:
        self._version += 1
        self.expected = None
        self.stage.operations.append(CacheOp(cache=self.number, **operation))

    def _current(self) -> StageReport | None:
        if self._seen is not None and self._seen[0] == self._version:
            return self._seen[1]
        return None

    def _query(self) -> CacheAnswer:
        return self.stage.ask(CacheOp(cache=self.number, query=CacheOp.Query())).answer


# mlx-lm saves a cache under its class's name and loads it by that name: what was saved of a
# handle comes back as a list of the stage's real caches, which the pipeline stores again.
RemoteCache.__name__ = SAVED_LIST
