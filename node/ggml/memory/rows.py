"""Caches as rows, each a sequence in llama.cpp's memory: no operation on them moves any data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from node.ggml.memory.places import Memory, Place, Places, State
from unicluster.errors import StageError


@dataclass
class Row:
    """One sequence of a batch, of `length` tokens.

    skip: columns of padding to come before its tokens. left: how many of its tokens are still to
    come before padding; None when there is none.
    """

    place: Place
    length: int = 0
    skip: int = 0
    left: int | None = None

    def count(self, columns: int) -> int:
        """Number of this row's tokens in the next `columns`; the others are padding."""
        count = columns - min(self.skip, columns)
        return count if self.left is None else min(count, self.left)

    def take(self, columns: int) -> tuple[int, int]:
        """Range [first, end) of this row's tokens in the next `columns`, which are consumed."""
        first, count = min(self.skip, columns), self.count(columns)
        self.skip -= first
        if self.left is not None:
            self.left -= count
        return first, first + count


class Sequences:
    """The sequences of a memory. Rows of several caches may share one until one of them grows."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._places = Places(memory)

    def new(self) -> Row:
        """An empty row. Raises StageError when there are too many."""
        return Row(self._places.new())

    @contextmanager
    def rows(self, count: int) -> Iterator[list[Row]]:
        """`count` new rows; they are released if the block raises."""
        made: list[Row] = []
        try:
            for _ in range(count):
                made.append(Row(self._places.new([row.place for row in made])))
            yield made
        except BaseException:
            for row in made:
                self.release(row)
            raise

    def share(self, row: Row) -> Row:
        """A second row over the sequence, for another cache."""
        row.place.users += 1
        return replace(row)

    def release(self, row: Row) -> None:
        self._places.release(row.place)

    def make_exclusive(self, row: Row, tokens: int) -> None:
        """Makes a row the only user of its sequence, of which it keeps the first `tokens`."""
        if self._memory.recurrent and 0 < tokens < row.length:
            raise StageError("a recurrent layer's state can't be trimmed by some tokens")
        self._own(row, tokens, ())

    def bring(self, rows: Sequence[Row]) -> list[int]:
        """Numbers of the rows' sequences in llama.cpp, where all are at once, for a forward.

        Each has a sequence of its own afterwards. Raises StageError for more than there can be.
        """
        pinned: list[Place] = []
        for row in rows:
            self._own(row, row.length, pinned)
            pinned.append(row.place)
        return [row.place.number for row in rows]

    def state(self, row: Row) -> State:
        """Saved state of a row."""
        return self._places.state(row.place)

    def nbytes(self, row: Row) -> tuple[int, int]:
        """Bytes of a row's saved state, and how many of them don't grow with its tokens."""
        return self._places.nbytes(row.place)

    def can_trim(self, row: Row, tokens: int) -> bool:
        """Whether a row can be trimmed by so many tokens."""
        left = row.length - tokens
        if left <= 0 or not tokens:
            return True
        return not self._memory.recurrent and left >= self._places.shortest(row.place)

    def _own(self, row: Row, tokens: int, pinned: Sequence[Place]) -> None:
        """As make_exclusive; and it is in llama.cpp's memory. Places in `pinned` stay there."""
        if row.place.users > 1:
            own = self._places.copy(row.place, tokens, pinned)
            self._places.release(row.place)
            row.place = own
        else:
            self._places.bring(row.place, pinned)
            if tokens < row.length:
                self._memory.trim(row.place.number, tokens)
        row.length = tokens


class Cache:
    """The rows of one batch, behind the operations of mlx-lm's caches.

    A cache that was just made has one row, or as many as the first batch that uses it.
    """

    def __init__(self, sequences: Sequences, rows: list[Row] | None = None) -> None:
        self._sequences = sequences
        self._rows = rows

    @classmethod
    def merge(cls, sequences: Sequences, caches: Sequence["Cache"]) -> "Cache":
        """One cache of the rows of several."""
        return cls(sequences, [sequences.share(row) for cache in caches for row in cache.rows])

    @property
    def rows(self) -> list[Row]:
        if self._rows is None:
            self._rows = [self._sequences.new()]
        return self._rows

    @property
    def made(self) -> Sequence[Row]:
        """Its rows; none of a new one, which may become any number."""
        return self._rows or ()

    @property
    def size(self) -> int:
        """Tokens of the longest row."""
        return max((row.length for row in self._rows or ()), default=0)

    def batch(self, count: int) -> list[Row]:
        """Its rows for a forward of so many."""
        if self._rows is None:
            with self._sequences.rows(count) as rows:
                self._rows = rows
        if len(self._rows) != count:
            raise ValueError(f"a batch of {count} for a cache of {len(self._rows)} rows")
        return self._rows

    def filter(self, indices: Sequence[int]) -> None:
        kept = [self._sequences.share(self.rows[index]) for index in indices]
        self.free()
        self._rows = kept

    def extend(self, other: "Cache") -> None:
        self._rows = [*self.rows, *(self._sequences.share(row) for row in other.rows)]

    def extract(self, index: int) -> "Cache":
        return Cache(self._sequences, [self._sequences.share(self.rows[index])])

    def copy(self) -> "Cache":
        if self._rows is None:
            return Cache(self._sequences)
        return Cache(self._sequences, [self._sequences.share(row) for row in self._rows])

    def prepare(self, skip: Sequence[int], lengths: Sequence[int], padding: Sequence[int]) -> None:
        """Announces padding; see mlx-lm's `prepare`. Empty where there is none."""
        if padding and not lengths:
            raise ValueError("right padding without lengths")
        for row, columns in zip(self.rows, skip, strict=False):
            row.skip = columns
        for row, tokens in zip(self.rows, lengths if any(padding) else (), strict=False):
            row.left = tokens

    def finalize(self) -> None:
        for row in self._rows or ():
            row.left = None

    def can_trim(self, tokens: int) -> bool:
        """Whether its last `tokens` can be trimmed."""
        return all(self._sequences.can_trim(row, tokens) for row in self._rows or ())

    def trim(self, tokens: int) -> None:
        for row in self._rows or ():
            self._sequences.make_exclusive(row, max(row.length - tokens, 0))

    def take(self, other: "Cache") -> None:
        """Has the rows of another cache instead of its present ones; the other is used up."""
        self.free()
        self._rows, other._rows = other._rows, []

    def free(self) -> None:
        for row in self._rows or ():
            self._sequences.release(row)
        self._rows = []
