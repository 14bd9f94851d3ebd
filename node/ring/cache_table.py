"""The caches of one session by number, and the operations that a frame asks for on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic

from google.protobuf.message import DecodeError

from node.prefixes.blocks import BLOCK_TOKENS
from node.ring.bounds import (
    MOST_ARRIVING,
    MOST_CACHES,
    MOST_ROWS,
    MOST_STATE_BYTES,
    MOST_TOKENS,
    FrameError,
)
from node.ring.cache_engine import C, CacheEngine
from node.ring.leaves import check_leaves
from node.ring.recalls import Recalls, prefix_name
from unicluster.errors import UniclusterError, in_one_line
from unicluster.v1.stage_pb2 import (
    DROP,
    MAKE,
    MISSING,
    READ,
    THERE,
    CacheOp,
    CacheState,
    StageReport,
)


@dataclass
class Slot(Generic[C]):
    """A cache, and the bounds that follow from the operations it went through.

    rows: of its batch; None until the first forward decides. tokens: at most so many in a row,
    padding included. padded: columns to come that `prepare` announced. is_snapshot: it holds
    only what can't be trimmed, for `restore`. skipped: tokens of cancelled frames since the last
    trim, which are not in it.
    """

    cache: C
    rows: int | None = None
    tokens: int = 0
    padded: int = 0
    is_snapshot: bool = False
    skipped: int = 0


class CacheTable(Generic[C]):
    """Caches by the numbers that the head gave them.

    Every number of an operation is checked before the engine sees it.
    """

    def __init__(self, engine: CacheEngine[C]) -> None:
        self._engine = engine
        self._slots: dict[int, Slot[C]] = {}
        # Saved states that take several frames, by cache and entry.
        self._leaving: dict[tuple[int, int], bytes] = {}
        self._arriving: dict[tuple[int, int], bytearray] = {}
        self._recalls = Recalls(engine)
        self._used_up: set[int] = set()  # snapshots that were put back and are still to be freed

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    def __getitem__(self, number: int) -> C:
        return self._slots[number].cache

    def apply(self, op: CacheOp, report: StageReport) -> None:
        """Carries one operation out; answers go into `report`.

        Raises FrameError for one that the engine does not have or the caches can't do, and the
        StageError of an engine without room.
        """
        name = op.WhichOneof("op")
        operation = OPERATIONS.get(name or "")
        if operation is None:
            raise self._engine.unsupported(name)
        with self.named(f"{name} of cache {op.cache}"):
            operation(self, op, report)

    def advance(self, number: int, rows: int, tokens: int) -> tuple[C, int]:
        """The cache to forward (rows, tokens) with, and the most tokens of its rows afterwards.

        Raises FrameError if they don't fit it.
        """
        slot = self._usable(number, touch=False)
        if slot.rows is not None and slot.rows != rows:
            raise FrameError(f"a batch of {rows} for {slot.rows} rows")
        if slot.skipped:
            raise FrameError(f"{slot.skipped} tokens before it were skipped")
        self._check("rows", rows, MOST_ROWS, least=1)
        self._check("tokens", slot.tokens + tokens, MOST_TOKENS, least=1)
        slot.rows = rows
        slot.tokens += tokens
        slot.padded = max(slot.padded - tokens, 0)
        return slot.cache, slot.tokens

    def skip(self, number: int, tokens: int) -> None:
        """Notes that a forward of so many tokens was left out."""
        slot = self._usable(number, touch=False)
        self._check("tokens", slot.tokens + slot.skipped + tokens, MOST_TOKENS, least=1)
        slot.skipped += tokens
        slot.padded = max(slot.padded - tokens, 0)

    def clear(self) -> None:
        """Frees all caches."""
        for slot in self._slots.values():
            self._engine.free(slot.cache)
        self._slots.clear()
        self._leaving.clear()
        self._arriving.clear()
        self._recalls.clear()
        self._used_up.clear()

    def make(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        self._slots[op.cache] = Slot(self._engine.make())

    def merge(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        self._check("sources", len(op.merge.sources), MOST_ROWS, least=1)
        sources = [self._settled(number) for number in op.merge.sources]
        for number, source in zip(op.merge.sources, sources, strict=True):
            if self._rows(source) != 1:
                raise FrameError(f"source {number} has {source.rows} rows instead of one")
        merged = self._engine.merge([source.cache for source in sources])
        tokens = max(source.tokens for source in sources)
        self._slots[op.cache] = Slot(merged, len(sources), tokens)

    def filter(self, op: CacheOp, report: StageReport) -> None:
        slot, rows = self._settled(op.cache), list(op.filter.rows)
        count = self._rows(slot)
        if not rows or len(set(rows)) != len(rows):
            raise FrameError("rows that are not different ones, at least one")
        self._check("row", max(rows), count - 1)
        self._engine.filter(slot.cache, rows)
        slot.rows = len(rows)

    def extend(self, op: CacheOp, report: StageReport) -> None:
        slot, other = self._settled(op.cache), self._settled(op.extend.other)
        if slot is other:
            raise FrameError("it can't be extended by itself")
        rows = self._rows(slot) + self._rows(other)
        self._check("rows", rows, MOST_ROWS)
        self._engine.extend(slot.cache, other.cache)
        slot.rows, slot.tokens = rows, max(slot.tokens, other.tokens)

    def extract(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        source = self._settled(op.extract.source)
        self._check("row", op.extract.row, self._rows(source) - 1)
        extracted = self._engine.extract(source.cache, op.extract.row)
        self._slots[op.cache] = Slot(extracted, 1, source.tokens)

    def prepare(self, op: CacheOp, report: StageReport) -> None:
        slot, asked = self._settled(op.cache), op.prepare
        rows, most = self._rows(slot), self._engine.most_tokens
        named = {
            "left_padding": asked.left_padding,
            "lengths": asked.lengths,
            "right_padding": asked.right_padding,
        }
        for name, numbers in named.items():
            if numbers and len(numbers) != rows:
                raise FrameError(f"{len(numbers)} {name} for {rows} rows")
            if numbers:
                self._check(f"{name} at least", min(numbers), most)
                self._check(name, max(numbers), most)
        if asked.right_padding and not asked.lengths:
            raise FrameError("right_padding without lengths")
        columns = {sum(pair) for pair in zip(asked.lengths, asked.right_padding, strict=False)}
        if len(columns) > 1:
            raise FrameError(f"rows of {min(columns)} to {max(columns)} columns")
        if asked.left_padding and slot.tokens:
            raise FrameError("left_padding for a cache that is not empty")
        self._engine.prepare(slot.cache, asked)
        slot.padded = max(columns) if columns and any(asked.right_padding) else 0

    def finalize(self, op: CacheOp, report: StageReport) -> None:
        self._engine.finalize(self._settled(op.cache).cache)

    def trim(self, op: CacheOp, report: StageReport) -> None:
        slot, tokens = self._settled(op.cache), op.trim.tokens
        if op.trim.guessed:
            tokens = self._guessed(slot, tokens)
        if not tokens:
            return
        if not self._engine.trimmable(slot.cache, tokens):
            raise FrameError(f"{tokens} tokens of a cache that can't be trimmed")
        self._check("tokens", tokens, self._engine.size(slot.cache))
        self._engine.trim(slot.cache, tokens)
        slot.tokens -= min(tokens, slot.tokens)

    def copy(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        source = self._usable(op.copy.source)
        self._slots[op.cache] = replace(source, cache=self._engine.copy(source.cache))

    def free(self, op: CacheOp, report: StageReport) -> None:
        if op.cache in self._used_up:
            self._used_up.remove(op.cache)
            return
        slot = self._slots.pop(op.cache, None)
        if slot is None:
            raise FrameError("there is no such cache")
        for parts in (self._leaving, self._arriving):
            for which in [each for each in parts if each[0] == op.cache]:
                del parts[which]
        self._engine.free(slot.cache)

    def query(self, op: CacheOp, report: StageReport) -> None:
        if op.cache in self._slots:
            report.answer.CopyFrom(self._engine.query(self._usable(op.cache).cache))
        report.answer.live = len(self)
        if self._engine.prefixes is not None:
            report.answer.unwritten = self._engine.prefixes.waiting

    def fetch(self, op: CacheOp, report: StageReport) -> None:
        slot, asked = self._settled(op.cache), op.fetch
        self._check("entry", asked.entry, self._engine.entries(slot.cache) - 1)
        if not asked.most_bytes:
            self._engine.fetch(slot.cache, asked.entry, report.state)
            return
        which = (op.cache, asked.entry)
        whole = self._leaving.get(which)
        if asked.offset == 0 or whole is None:
            state = CacheState()
            self._engine.fetch(slot.cache, asked.entry, state)
            whole = state.SerializeToString()
            self._leaving = {which: whole}  # one at a time: another is made anew
        self._check("offset", asked.offset, len(whole))
        end = asked.offset + asked.most_bytes
        report.state.total = len(whole)
        report.state.part = whole[asked.offset : end]
        if end >= len(whole):
            self._leaving.clear()

    def store(self, op: CacheOp, report: StageReport) -> None:
        slot, store = self._settled(op.cache), op.store
        self._check("entry", store.entry, self._engine.entries(slot.cache) - 1)
        kind, state = store.kind, store.state
        if store.part:
            whole = self._joined(op)
            if store.more:
                return
            kind, state = whole.kind, whole.state
        check_leaves(state)
        rows, tokens = self._engine.store(slot.cache, store.entry, kind, state)
        if rows is not None and slot.rows is not None and rows != slot.rows:
            raise FrameError(f"{rows} rows for {slot.rows} rows")
        self._check("rows", rows or 0, MOST_ROWS)
        self._check("tokens", tokens, self._engine.most_tokens)
        slot.rows = slot.rows if rows is None else rows
        slot.tokens = max(slot.tokens, tokens)

    def _joined(self, op: CacheOp) -> CacheState:
        """The state of which this operation has a part; an empty one while others follow."""
        which = (op.cache, op.store.entry)
        arrived = self._arriving.setdefault(which, bytearray())
        self._check("states in parts", len(self._arriving), MOST_ARRIVING)
        size = sum(map(len, self._arriving.values())) + len(op.store.part)
        self._check("bytes", size, MOST_STATE_BYTES)
        arrived += op.store.part
        if op.store.more:
            return CacheState()
        whole = self._arriving.pop(which)
        try:
            return CacheState.FromString(bytes(whole))
        except DecodeError as error:
            raise FrameError("parts that are no state") from error

    def quantize(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        source, asked = self._settled(op.quantize.source), op.quantize
        made = self._engine.quantize(source.cache, asked.bits, asked.group_size)
        self._slots[op.cache] = replace(source, cache=made)

    def snapshot(self, op: CacheOp, report: StageReport) -> None:
        self._check_new(op.cache)
        source = self._settled(op.snapshot.source)
        saved = self._engine.snapshot(source.cache, single=op.snapshot.single)
        self._slots[op.cache] = replace(source, cache=saved, is_snapshot=True)

    def restore(self, op: CacheOp, report: StageReport) -> None:
        slot, number, tokens = self._settled(op.cache), op.restore.snapshot, op.restore.tokens
        used = [number, *op.restore.later]
        self._check("snapshots", len(set(used)), MOST_CACHES, least=len(used))
        saved, *later = [self._saved(each, slot) for each in used]
        tokens = self._guessed(slot, tokens)
        if saved.tokens + tokens != slot.tokens:
            raise FrameError(f"{tokens} tokens since the snapshot, of {slot.tokens - saved.tokens}")
        for earlier, after in pairwise([saved, *later, slot]):
            if earlier.tokens > after.tokens:
                raise FrameError("snapshots in another order than they were made in")
        for each in used:
            del self._slots[each]
        self._used_up.update(used)
        self._engine.restore(slot.cache, saved.cache, tokens, [each.cache for each in later])
        slot.tokens = saved.tokens

    def _saved(self, number: int, slot: Slot[C]) -> Slot[C]:
        """A snapshot for a cache."""
        saved = self._slots.get(number)
        if saved is None or not saved.is_snapshot:
            raise FrameError(f"there is no snapshot {number}")
        if saved.rows not in (None, slot.rows):
            raise FrameError(f"a snapshot of {saved.rows} rows for {slot.rows} rows")
        return saved

    def save(self, op: CacheOp, report: StageReport) -> None:
        slot, name = self._settled(op.cache), prefix_name(op.save.name)
        if self._rows(slot) != 1:
            raise FrameError(f"a prefix of {slot.rows} rows")
        self._check("blocks", len(op.save.blocks), MOST_TOKENS // BLOCK_TOKENS)
        blocks = [prefix_name(block) for block in op.save.blocks]
        prefixes = self._engine.prefixes
        if prefixes is None or (not op.save.idle and prefixes.hurry(name)):
            return
        prefixes.put(name, self._engine.save(slot.cache), blocks, idle=op.save.idle)

    def recall(self, op: CacheOp, report: StageReport) -> None:
        name, step = op.recall.name, op.recall.step
        if step == READ:
            report.answer.recalled = self._recalls.read(name)
        elif step == MAKE:
            self._check_new(op.cache)
            made = self._recalls.make(name)
            report.answer.recalled = MISSING if made is None else THERE
            cache, tokens = (made[0], made[1].tokens) if made else (self._engine.make(), 0)
            self._slots[op.cache] = Slot(cache, 1 if made else None, tokens)
            report.answer.size = self._engine.size(cache)
        elif step == DROP:
            self._recalls.drop(name)
        else:
            self._recalls.erase(name)

    def _guessed(self, slot: Slot[C], tokens: int) -> int:
        """Tokens in a cache, of `tokens` of frames that were cancelled: the others were skipped."""
        if slot.skipped > tokens:
            raise FrameError(f"{tokens} tokens, of which {slot.skipped} were skipped")
        tokens, slot.skipped = tokens - slot.skipped, 0
        return tokens

    def _usable(self, number: int, *, touch: bool = True) -> Slot[C]:
        slot = self._slots.get(number)
        if slot is None:
            raise FrameError(f"there is no cache {number}")
        if slot.is_snapshot:
            raise FrameError(f"cache {number} is a snapshot")
        if touch:
            self._engine.touch(slot.cache)
        return slot

    def _settled(self, number: int) -> Slot[C]:
        """A cache that does not wait for columns that `prepare` announced."""
        slot = self._usable(number)
        if slot.padded:
            raise FrameError(f"cache {number} was prepared for {slot.padded} more columns")
        return slot

    def _rows(self, slot: Slot[C]) -> int:
        """Rows of a cache; from now on one, where no forward has decided."""
        if slot.rows is None:
            slot.rows = 1
        return slot.rows

    def _check_new(self, number: int) -> None:
        if not number:
            raise FrameError("caches are numbered from 1")
        if number in self._slots or number in self._used_up:
            raise FrameError("there is one of that number already")
        self._check("caches", len(self) + len(self._used_up), MOST_CACHES - 1)

    def _check(self, name: str, value: int, most: int, least: int = 0) -> None:
        if not least <= value <= most:
            raise FrameError(f"{name} {value}, not within {least}-{most}")

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Prefixes errors with the operation and the cache's number."""
        try:
            yield
        except FrameError as error:
            raise FrameError(f"{operation}: {error}") from error
        except UniclusterError:
            raise
        except Exception as error:
            engine = self._engine.engine
            raise FrameError(f"{operation}: {engine} can't: {in_one_line(error)}") from error


# By the name of the field in CacheOp, which is that of the method.
OPERATIONS: dict[str, Callable[["CacheTable[C]", CacheOp, StageReport], None]] = {
    field.name: getattr(CacheTable, field.name)
    for field in CacheOp.DESCRIPTOR.oneofs_by_name["op"].fields
    if hasattr(CacheTable, field.name)
}
