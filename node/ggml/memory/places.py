"""Places of sequences in llama.cpp's memory, and on the host what has none for the moment.

llama.cpp keeps only so many sequences apart, of a model with recurrent states a few. What nobody
computes with may be more, and how much of it there is at a moment depends on when frames arrive:
prefix caches, deferred results, and caches whose release is on its way. So the least recently used
one makes room, and comes back when it is needed. What waits so is part of the plan's memory, and
no more than it counts.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unicluster.errors import StageError

# Sequences on the host, for each place in llama.cpp's memory; empty ones have hardly any bytes.
SAVED_PER_PLACE = 2

State = np.ndarray[Any, np.dtype[np.uint8]]


class Memory(Protocol):
    """A context of llama.cpp, of which sequences are known by number."""

    recurrent: bool

    @property
    def sequences(self) -> int:
        """Number of sequences at once, at most."""

    @property
    def host_bytes(self) -> int:
        """Bytes of sequences that wait on the host, at most."""

    def copy(self, source: int, to: int, tokens: int) -> None:
        """Gives the sequence `to`, which is empty, the first `tokens` of another."""

    def trim(self, sequence: int, tokens: int) -> None:
        """Trims a sequence to its first `tokens`."""

    def state_size(self, sequence: int) -> int:
        """Bytes of a sequence's saved state."""

    def fixed_size(self, sequence: int) -> int:
        """Bytes of a saved state that don't grow with the sequence's tokens."""

    def state(self, sequence: int) -> State:
        """Saved state of a sequence."""

    def restore(self, sequence: int, state: State) -> None:
        """Raises StageError where there is no room for it."""

    def shortest(self, sequence: int, *, saved: bool = False) -> int:
        """Tokens that a sequence has at least after a trim, but for one to none; saved: once it
        was saved and restored.
        """


@dataclass(eq=False)
class Place:
    """One sequence. number: in llama.cpp; of no use once it is saved, as `state`.

    fixed: how many bytes of that don't grow with its tokens. shortest: see Memory, once restored.
    """

    number: int
    users: int = 1
    state: State | None = None
    fixed: int = 0
    shortest: int = 0


class Places:
    """All sequences of a memory: those that have a number there, and saved ones."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.count = memory.sequences
        self._free = list(range(self.count))
        self._here: dict[Place, None] = {}  # the least recently used first
        self._saved: set[Place] = set()

    def __len__(self) -> int:
        return len(self._here) + len(self._saved)

    @property
    def saved_bytes(self) -> int:
        """Bytes of the sequences on the host."""
        return sum(place.state.nbytes for place in self._saved if place.state is not None)

    def new(self, pinned: Collection[Place] = ()) -> Place:
        """An empty sequence; room is made for it, but not of those `pinned`.

        Raises StageError when there are too many.
        """
        place = Place(self._number(pinned))
        self._here[place] = None
        return place

    def bring(self, place: Place, pinned: Collection[Place] = ()) -> int:
        """The number of a sequence, which is in llama.cpp's memory afterwards.

        Raises StageError where that has no room for all that are pinned.
        """
        if place in self._here:
            del self._here[place]  # to be the last one
            self._here[place] = None
            return place.number
        number = self._number(pinned)
        try:
            self._restore(number, place, pinned)
        except BaseException:
            heapq.heappush(self._free, number)
            raise
        self._saved.remove(place)
        place.number, place.state = number, None
        self._here[place] = None
        return number

    def copy(self, source: Place, tokens: int, pinned: Collection[Place]) -> Place:
        """A second sequence, of the first `tokens` of another; of a recurrent one of all."""
        made = self.new(pinned)
        try:
            if not tokens:
                return made
            if source in self._here:
                self._memory.copy(source.number, made.number, tokens)
            else:
                self._restore(made.number, source, [*pinned, made])
                if not self._memory.recurrent:
                    self._memory.trim(made.number, tokens)
        except BaseException:
            self.release(made)
            raise
        return made

    def state(self, place: Place) -> State:
        """Saved state of a sequence, wherever it is."""
        return self._memory.state(place.number) if place.state is None else place.state

    def nbytes(self, place: Place) -> tuple[int, int]:
        """Bytes of a sequence's saved state, and how many of them don't grow with its tokens."""
        if place.state is not None:
            return place.state.size, place.fixed
        return self._memory.state_size(place.number), self._memory.fixed_size(place.number)

    def shortest(self, place: Place) -> int:
        """Tokens that a sequence has at least after a trim, but for one to none."""
        return self._memory.shortest(place.number) if place.state is None else place.shortest

    def release(self, place: Place) -> None:
        """Gives up one use of a sequence, which ends with the last one."""
        place.users -= 1
        if place.users:
            return
        self._saved.discard(place)
        place.state = None
        if place in self._here:
            del self._here[place]
            self._memory.trim(place.number, 0)
            heapq.heappush(self._free, place.number)

    def _number(self, pinned: Collection[Place]) -> int:
        """A number that no sequence has any more."""
        if not self._free and not self._save_one(pinned):
            raise StageError(
                f"{len(self)} caches are all that llama.cpp can keep apart here: "
                "serve with more --users"
            )
        return heapq.heappop(self._free)

    def _save_one(self, pinned: Collection[Place]) -> bool:
        """Saves the least recently used sequence that the host has room for; False for none."""
        room = self._memory.host_bytes - self.saved_bytes
        small = (each for each in self._here if self._memory.state_size(each.number) <= room)
        place = next((each for each in small if each not in pinned), None)
        if place is None or len(self._saved) >= SAVED_PER_PLACE * self.count:
            return False
        place.fixed = self._memory.fixed_size(place.number)
        place.shortest = self._memory.shortest(place.number, saved=True)
        place.state = self._memory.state(place.number)
        del self._here[place]
        self._saved.add(place)
        self._memory.trim(place.number, 0)
        heapq.heappush(self._free, place.number)
        return True

    def _restore(self, number: int, saved: Place, pinned: Collection[Place]) -> None:
        """Puts a saved state back, and others away for it where cells are short."""
        assert saved.state is not None  # noqa: S101
        while True:
            try:
                self._memory.restore(number, saved.state)
            except StageError:
                self._memory.trim(number, 0)
                if not self._save_one(pinned):
                    raise
            else:
                return
