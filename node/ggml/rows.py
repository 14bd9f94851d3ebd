"""Caches as rows, each a sequence in llama.cpp's memory: no operation on them moves any data."""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from node.ggml.layers import Layers
from unicluster.errors import StageError


@dataclass
class Row:
    """One sequence of a batch, of `length` tokens.

    skip: columns of padding to come before its tokens. left: how many of its tokens are still to
    come before padding; None when there is none.
    """

    sequence: int
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

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._free = list(range(layers.sequences))
        self._users: dict[int, int] = {}

    def new(self) -> Row:
        """An empty row. Raises StageError when there are too many."""
        if not self._free:
            raise StageError(
                f"{len(self._users)} caches are all that llama.cpp can keep apart here: "
                "serve with more --users"
            )
        sequence = heapq.heappop(self._free)
        self._users[sequence] = 1
        return Row(sequence)

    @contextmanager
    def rows(self, count: int) -> Iterator[list[Row]]:
        """`count` new rows; they are released if the block raises."""
        made: list[Row] = []
        try:
            for _ in range(count):
                made.append(self.new())
            yield made
        except BaseException:
            for row in made:
                self.release(row)
            raise

    def share(self, row: Row) -> Row:
        """A second row over the sequence, for another cache."""
        self._users[row.sequence] += 1
        return replace(row)

    def release(self, row: Row) -> None:
        self._users[row.sequence] -= 1
        if not self._users[row.sequence]:
            del self._users[row.sequence]
            self._layers.trim(row.sequence, 0)
            heapq.heappush(self._free, row.sequence)

    def make_exclusive(self, row: Row, tokens: int | None = None) -> None:
        """Makes a row the only user of its sequence, of which it keeps the first `tokens`."""
        length = row.length if tokens is None else tokens
        if self._layers.recurrent and 0 < length < row.length:
            raise StageError("a recurrent layer's state can't be trimmed by some tokens")
        if self._users[row.sequence] > 1:
            copy = self.new()
            if length:
                self._layers.copy(row.sequence, copy.sequence, length)
            self._users[row.sequence] -= 1
            row.sequence = copy.sequence
        elif length < row.length:
            self._layers.trim(row.sequence, length)
        row.length = length


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
        """Its rows for a forward of so many, each with a sequence of its own to write to."""
        if self._rows is None:
            with self._sequences.rows(count) as rows:
                self._rows = rows
        if len(self._rows) != count:
            raise ValueError(f"a batch of {count} for a cache of {len(self._rows)} rows")
        for row in self._rows:
            self._sequences.make_exclusive(row)
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
