"""A lane: answers that decode together, apart from those of other lanes."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from node.generation.batch import BatchDecoder
from node.generation.moving import MovingDecoder
from node.generation.piped import PipedDecoder
from node.generation.sequence import Sequence
from node.generation.single import SingleDecoder
from node.generation.ticket import CANCELLED
from node.metering.timeline import Timeline
from unicluster.errors import AnswerError

log = logging.getLogger("unicluster.lane")

Decoder = BatchDecoder | SingleDecoder | PipedDecoder | MovingDecoder


class Lane:
    """Up to `places` sequences, from the start of their prefill to their end.

    Used on the MLX thread; not usable after an error raised by `step`. `steps` and `tokens` count
    what was decoded.
    """

    def __init__(
        self,
        decoder: Decoder,
        places: int,
        keep: Callable[[list[int], list[Any]], None] | None,
    ) -> None:
        """`keep` gets the tokens and the cache of each answer that has finished or broken off."""
        self.places = places
        self.sequences: set[Sequence] = set()
        self.awake = False  # whether a fiber steps it
        self.steps = 0
        self.tokens = 0
        self._decoder = decoder
        self._keep = keep
        self._joining: deque[Sequence] = deque()
        self._decoding: set[Sequence] = set()

    @property
    def free(self) -> int:
        """Free places for sequences."""
        return self.places - len(self.sequences)

    @property
    def busy(self) -> bool:
        """Whether any sequence is decoding or about to."""
        return bool(self._joining or self._decoding)

    @property
    def decoding(self) -> int:
        """Answers that get a token in each step."""
        return len(self._decoding)

    @property
    def timelines(self) -> list[Timeline]:
        """Timelines of the traced answers among those of the next step."""
        answers = (sequence.answer for sequence in (*self._decoding, *self._joining))
        return [answer.timeline for answer in answers if answer.timeline is not None]

    def join(self, sequence: Sequence) -> None:
        """Decodes a prefilled sequence from the next step on."""
        self._joining.append(sequence)

    def step(self) -> list[Sequence]:
        """Decodes one token for each answer; returns the sequences that have left.

        They have ended, or were cancelled; their caches are cached as prefixes or freed.
        """
        gone = [sequence for sequence in self._decoding if sequence.ticket.ended]
        for sequence in gone:
            self._remove(sequence)
        while self._joining:
            sequence = self._joining.popleft()
            if sequence.ticket.ended:
                self.sequences.remove(sequence)
                self.keep_begun(sequence)
                gone.append(sequence)
            else:
                self._decoder.add(sequence)
                self._decoding.add(sequence)
        if not self._decoding:
            return gone
        ended: list[Sequence] = []
        for sequence, token, logprobs in self._decoder.step():
            if sequence in ended:
                continue  # an accepted draft beyond the end
            ticket, answer = sequence.ticket, sequence.answer
            self.tokens += 1
            constraint = sequence.job.constraint
            if constraint is not None and constraint.error is not None:
                ticket.end(constraint.error)
                ended.append(sequence)
                continue
            try:
                ticket.send(answer.add(token, logprobs))
            except Exception as error:  # one answer's odd text must not end the others
                log.exception("an answer's text failed")
                reason = f"{type(error).__name__}: {error}"
                ticket.end(AnswerError(f"the answer can't be read: {reason}"))
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

    def keep_begun(self, sequence: Sequence) -> None:
        """Keeps or frees the cache of a sequence that ended before its prefill did."""
        cache, sequence.cache = sequence.cache, []
        if self._keep is not None and cache and _is_of_use(sequence):
            self._keep(sequence.prompt[: sequence.cached], cache)

    def _remove(self, sequence: Sequence) -> None:
        self._decoding.remove(sequence)
        self.sequences.remove(sequence)
        if self._keep is not None and _is_of_use(sequence):
            self._keep(*self._decoder.take(sequence))
        else:
            self._decoder.remove(sequence)


def _is_of_use(sequence: Sequence) -> bool:
    """Whether the cache of an ended answer is one to reuse.

    That of an answer whose client left is: it may come back, here or through another coordinator.
    """
    ticket, answer = sequence.ticket, sequence.answer
    return not sequence.job.no_reuse and (answer.finished or ticket.broken == CANCELLED)
