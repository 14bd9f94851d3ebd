"""A lane: answers that decode together, apart from those of other lanes."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from node.generation.batch import Batch
from node.generation.sequence import Sequence
from node.generation.single import Solo
from node.metering.timeline import Timeline
from unicluster.errors import StageError

log = logging.getLogger("unicluster.lane")


class Lane:
    """Up to `places` sequences, from the start of their prefill to their end.

    For the MLX thread. After an error raised by `step` it is of no use. `steps` and `tokens`
    count what it did.
    """

    def __init__(
        self,
        decoder: Batch | Solo,
        places: int,
        keep: Callable[[list[int], list[Any]], None] | None,
    ) -> None:
        """keep: gets the tokens and the cache of each answer that has finished."""
        self.places = places
        self.sequences: set[Sequence] = set()
        self.awake = False  # whether somebody steps it
        self.steps = 0
        self.tokens = 0
        self._decoder = decoder
        self._keep = keep
        self._joining: deque[Sequence] = deque()
        self._decoding: set[Sequence] = set()

    @property
    def free(self) -> int:
        """Places for more sequences."""
        return self.places - len(self.sequences)

    @property
    def busy(self) -> bool:
        """Whether there is anything to step for."""
        return bool(self._joining or self._decoding)

    @property
    def decoding(self) -> int:
        """Answers that get a token in each step."""
        return len(self._decoding)

    @property
    def timelines(self) -> list[Timeline]:
        """Of the answers that the next step is for, those that are traced."""
        answers = (sequence.answer for sequence in (*self._decoding, *self._joining))
        return [answer.timeline for answer in answers if answer.timeline is not None]

    def join(self, sequence: Sequence) -> None:
        """Decodes a prefilled sequence from the next step on."""
        self._joining.append(sequence)

    def step(self) -> list[Sequence]:
        """One token for each answer; returns the sequences that have left.

        They have ended, or were cancelled; their caches are kept or freed.
        """
        gone = [sequence for sequence in self._decoding if sequence.ticket.ended]
        for sequence in gone:
            self._remove(sequence)
        while self._joining:
            sequence = self._joining.popleft()
            if sequence.ticket.ended:
                self.sequences.remove(sequence)
                sequence.cache = []
                gone.append(sequence)
            else:
                self._decoder.add(sequence)
                self._decoding.add(sequence)
        if not self._decoding:
            return gone
        ended: list[Sequence] = []
        for sequence, token, logprobs in self._decoder.step():
            if sequence in ended:
                continue  # what was guessed right beyond its end
            ticket, answer = sequence.ticket, sequence.answer
            self.tokens += 1
            try:
                ticket.send(answer.add(token, logprobs))
            except Exception as error:  # one answer's odd text must not end the others
                log.exception("an answer's text failed")
                ticket.end(StageError(f"the answer can't be read: {type(error).__name__}: {error}"))
                ended.append(sequence)
            else:
                if answer.finished:
                    ticket.end()
                    ended.append(sequence)
        self.steps += 1
        for sequence in ended:
            self._remove(sequence)
        return gone + ended

    def close(self) -> None:
        self._decoder.close()

    def _remove(self, sequence: Sequence) -> None:
        self._decoding.remove(sequence)
        self.sequences.remove(sequence)
        if self._keep is not None and sequence.answer.finished and not sequence.job.no_reuse:
            self._keep(*self._decoder.take(sequence))
        else:
            self._decoder.remove(sequence)
