"""Cache operations of an engine, as a CacheTable asks for them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from node.prefixes.saved import SavedEntry
from node.prefixes.store import PrefixStore
from node.ring.bounds import MOST_TOKENS, FrameError
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, CacheState
from unicluster.v1.tensor_pb2 import Leaf

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    Leaves = RepeatedCompositeFieldContainer[Leaf]

C = TypeVar("C")  # an engine's cache: of all layers of the stage together


class Extent(NamedTuple):
    """rows: of a batch; None of an empty cache, which takes any. tokens: at most, in each row."""

    rows: int | None
    tokens: int


class CacheEngine(ABC, Generic[C]):
    """Cache operations of one engine; each has the name of its field in CacheOp.

    prefixes: the stage's on disk; None where nothing is kept there.
    """

    engine: ClassVar[str]
    prefixes: PrefixStore | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens that a row may have."""
        return MOST_TOKENS

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
        """Ends the padding that `prepare` announced."""

    @abstractmethod
    def trim(self, cache: C, tokens: int) -> None:
        """Trims the last `tokens`."""

    @abstractmethod
    def copy(self, cache: C) -> C:
        """A copy of a cache, which changes independently."""

    @abstractmethod
    def free(self, cache: C) -> None:
        """Frees the memory of a cache, which is not used again."""

    @abstractmethod
    def query(self, cache: C) -> CacheAnswer:
        """State of a cache, without `live`."""

    @abstractmethod
    def trimmable(self, cache: C, tokens: int = 0) -> bool:
        """Whether the last `tokens` of a cache can be trimmed; 0: any number of them."""

    @abstractmethod
    def size(self, cache: C) -> int:
        """Tokens in a cache; 0 of one that does not count them."""

    @abstractmethod
    def entries(self, cache: C) -> int:
        """Number of states that a cache is saved as."""

    @abstractmethod
    def fetch(self, cache: C, entry: int, into: CacheState) -> None:
        """Writes the state of one entry, to be saved, into an empty message."""

    @abstractmethod
    def store(self, cache: C, entry: int, kind: str, state: "Leaves") -> Extent:
        """Replaces one entry by a saved state. Raises FrameError if it does not fit."""

    def quantize(self, cache: C, bits: int, group_size: int) -> C:
        """A copy with its KV caches quantized."""
        raise self.unsupported("quantize")

    @abstractmethod
    def snapshot(self, cache: C, *, single: bool = False) -> C:
        """The parts of a cache that can't be trimmed, for `restore`.

        single: all forwards until then are of one token.
        """

    @abstractmethod
    def restore(self, cache: C, snapshot: C, tokens: int, later: Sequence[C] = ()) -> None:
        """Puts a snapshot back and trims the rest by `tokens`.

        later: snapshots made since, in order. All are used up.
        """

    @abstractmethod
    def save(self, cache: C) -> list[SavedEntry]:
        """The state of a cache of one row, for a file that is written while the cache lives on.

        Takes no longer than its bytes can be copied, and where the engine can, copies nothing.
        """

    @abstractmethod
    def revive(self, entries: Sequence[SavedEntry]) -> tuple[C, Extent]:
        """A cache of a saved state, and its extent.

        Raises FrameError if it does not fit the layers, StageError where there is no room.
        """

    def unsupported(self, operation: str | None) -> FrameError:
        """The error for an operation that this engine does not have."""
        return FrameError(f"{self.engine} has no cache operation {operation or 'of that name'}")
