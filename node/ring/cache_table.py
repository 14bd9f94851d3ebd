"""The caches of one session by number, and the operations that a frame asks for on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, CacheState, StageReport
from unicluster.v1.tensor_pb2 import Leaf

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    Leaves = RepeatedCompositeFieldContainer[Leaf]

C = TypeVar("C")  # an engine's cache: of all layers of the stage together


class CacheEngine(ABC, Generic[C]):
    """Cache operations of one engine; each has the name of its field in CacheOp."""

    engine: ClassVar[str]

    def touch(self, cache: C) -> None:
        """Called before an operation reads or changes a cache."""

    @abstractmethod
    def make(self) -> C:
        """A new, empty cache."""

    @abstractmethod
    def merge(self, sources: Sequence[C]) -> C:
        """A batch of one row a source."""

    @abstractmethod
    def filter(self, cache: C, rows: Sequence[int]) -> None:
        """Keeps these rows of a batch, in this order."""

    @abstractmethod
    def extend(self, cache: C, other: C) -> None:
        """Adds the rows of another batch."""

    @abstractmethod
    def extract(self, cache: C, row: int) -> C:
        """A cache of one row of a batch."""

    @abstractmethod
    def prepare(self, cache: C, padding: CacheOp.Prepare) -> None:
        """Announces columns of padding, one number a row in each list that is not empty."""

    @abstractmethod
    def finalize(self, cache: C) -> None:
        """Ends what `prepare` announced."""

    @abstractmethod
    def trim(self, cache: C, tokens: int) -> None:
        """Takes the last `tokens` off."""

    @abstractmethod
    def copy(self, cache: C) -> C:
        """A cache of the same content that changes on its own."""

    @abstractmethod
    def free(self, cache: C) -> None:
        """Lets go of what a cache holds; it is not used again."""

    @abstractmethod
    def query(self, cache: C) -> CacheAnswer:
        """All about a cache but `live`."""

    @abstractmethod
    def fetch(self, cache: C, entry: int, into: CacheState) -> None:
        """Writes the state of one entry, to be saved, into an empty message."""

    @abstractmethod
    def store(self, cache: C, entry: int, kind: str, state: "Leaves") -> None:
        """Replaces one entry by a saved state."""

    def quantize(self, cache: C, bits: int, group_size: int) -> C:
        """A copy with its KV caches quantized."""
        raise self.unsupported("quantize")

    @abstractmethod
    def snapshot(self, cache: C) -> C:
        """The parts of a cache that can't be trimmed, for `restore`."""

    @abstractmethod
    def restore(self, cache: C, snapshot: C, tokens: int) -> None:
        """Puts a snapshot back and trims the rest by `tokens`. The snapshot is used up."""

    def unsupported(self, operation: str | None) -> StageError:
        """The error for an operation that this engine does not have."""
        return StageError(f"{self.engine} has no cache operation {operation or 'of that name'}")


class CacheTable(Generic[C]):
    """Caches by the numbers that the head gave them."""

    def __init__(self, engine: CacheEngine[C]) -> None:
        self._engine = engine
        self._caches: dict[int, C] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def __contains__(self, number: int) -> bool:
        return number in self._caches

    def __getitem__(self, number: int) -> C:
        return self._caches[number]

    def apply(self, op: CacheOp, report: StageReport) -> None:
        """Carries one operation out; answers go into `report`.

        Raises StageError for an operation that the engine does not have, and whatever the
        engine raises.
        """
        name = op.WhichOneof("op")
        operation = OPERATIONS.get(name or "")
        if operation is None:
            raise self._engine.unsupported(name)
        operation(self, op, report)

    def clear(self) -> None:
        """Frees all caches."""
        for cache in self._caches.values():
            self._engine.free(cache)
        self._caches.clear()

    def make(self, op: CacheOp, report: StageReport) -> None:
        self._caches[op.cache] = self._engine.make()

    def merge(self, op: CacheOp, report: StageReport) -> None:
        sources = [self._touched(number) for number in op.merge.sources]
        self._caches[op.cache] = self._engine.merge(sources)

    def filter(self, op: CacheOp, report: StageReport) -> None:
        self._engine.filter(self._touched(op.cache), list(op.filter.rows))

    def extend(self, op: CacheOp, report: StageReport) -> None:
        self._engine.extend(self._touched(op.cache), self._touched(op.extend.other))

    def extract(self, op: CacheOp, report: StageReport) -> None:
        source = self._touched(op.extract.source)
        self._caches[op.cache] = self._engine.extract(source, op.extract.row)

    def prepare(self, op: CacheOp, report: StageReport) -> None:
        self._engine.prepare(self._touched(op.cache), op.prepare)

    def finalize(self, op: CacheOp, report: StageReport) -> None:
        self._engine.finalize(self._touched(op.cache))

    def trim(self, op: CacheOp, report: StageReport) -> None:
        self._engine.trim(self._touched(op.cache), op.trim.tokens)

    def copy(self, op: CacheOp, report: StageReport) -> None:
        self._caches[op.cache] = self._engine.copy(self._touched(op.copy.source))

    def free(self, op: CacheOp, report: StageReport) -> None:
        # A snapshot that was put back is gone before the head frees it.
        if op.cache in self._caches:
            self._engine.free(self._caches.pop(op.cache))

    def query(self, op: CacheOp, report: StageReport) -> None:
        if op.cache in self._caches:
            report.answer.CopyFrom(self._engine.query(self._touched(op.cache)))
        report.answer.live = len(self)

    def fetch(self, op: CacheOp, report: StageReport) -> None:
        self._engine.fetch(self._touched(op.cache), op.fetch.entry, report.state)

    def store(self, op: CacheOp, report: StageReport) -> None:
        store = op.store
        self._engine.store(self._touched(op.cache), store.entry, store.kind, store.state)

    def quantize(self, op: CacheOp, report: StageReport) -> None:
        source, asked = self._touched(op.quantize.source), op.quantize
        self._caches[op.cache] = self._engine.quantize(source, asked.bits, asked.group_size)

    def snapshot(self, op: CacheOp, report: StageReport) -> None:
        self._caches[op.cache] = self._engine.snapshot(self._touched(op.snapshot.source))

    def restore(self, op: CacheOp, report: StageReport) -> None:
        cache, saved = self._touched(op.cache), self._caches.pop(op.restore.snapshot)
        self._engine.restore(cache, saved, op.restore.tokens)

    def _touched(self, number: int) -> C:
        cache = self._caches[number]
        self._engine.touch(cache)
        return cache


# By the name of the field in CacheOp, which is that of the method.
OPERATIONS: dict[str, Callable[["CacheTable[C]", CacheOp, StageReport], None]] = {
    field.name: getattr(CacheTable, field.name)
    for field in CacheOp.DESCRIPTOR.oneofs_by_name["op"].fields
    if hasattr(CacheTable, field.name)
}
