"""A decoder that guesses for an answer that is alone, and decodes several together.

An answer moves from one decoder to the other with its cache, its sampler and its processors: its
text is that of either alone.
"""

from typing import Any

from node.generation.batch import BatchDecoder, Token
from node.generation.piped import PipedDecoder
from node.generation.sequence import Sequence

# Steps that an answer left alone has to go on, before it is taken out of its batch: others may
# come, and each move copies its cache.
STEPS_ALONE = 8


class MovingDecoder:
    """Decodes by one of two decoders, of which at most one has sequences."""

    def __init__(self, together: BatchDecoder, alone: PipedDecoder) -> None:
        self._together = together
        self._alone = alone
        self._sequences: set[Sequence] = set()
        self._lone: Sequence | None = None  # the sequence that `alone` has
        self._steps_alone = 0

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence."""
        if self._sequences:
            self._join()
            self._together.add(sequence)
        else:
            self._lone = sequence
            self._alone.add(sequence)
        self._sequences.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        self._of(sequence).remove(sequence)
        self._forget(sequence)

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes a sequence; returns the tokens in its cache, answer included, and the cache."""
        taken = self._of(sequence).take(sequence)
        self._forget(sequence)
        return taken

    def step(self) -> list[Token]:
        """Decodes tokens of each answer: one at most where they are several."""
        if self._lone is not None:
            return self._alone.step()
        self._steps_alone = self._steps_alone + 1 if len(self._sequences) == 1 else 0
        if self._steps_alone <= STEPS_ALONE:
            return self._together.step()
        (sequence,) = self._sequences
        chosen = self._together.hand_over(sequence)
        self._alone.add(sequence)
        self._lone = sequence
        return chosen

    def close(self) -> None:
        self._together.close()
        self._alone.close()

    def _join(self) -> None:
        """Moves a lone sequence to where it can decode with others."""
        sequence, self._lone = self._lone, None
        self._steps_alone = 0
        if sequence is not None:
            self._alone.hand_over(sequence)
            self._together.add(sequence)

    def _of(self, sequence: Sequence) -> BatchDecoder | PipedDecoder:
        return self._alone if sequence is self._lone else self._together

    def _forget(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        if sequence is self._lone:
            self._lone = None
