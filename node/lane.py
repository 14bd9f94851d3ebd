"""A lane: one batch of answers that decode together."""

import logging
from typing import Any

from mlx_lm.generate import BatchGenerator

from node.answer import Answer
from node.ticket import Ticket
from unicluster.errors import StageError

log = logging.getLogger("unicluster.lane")

# Prompts that are computed together, padded to the longest: more would make long prompts'
# frames too big, fewer would let one long prompt hold up all that come after it.
PREFILL_TOGETHER = 4


class Lane:
    """An mlx-lm BatchGenerator and the requests that run in it, at most `users`.

    For the MLX thread. After an error raised by `add`, `remove` or `step` it is of no use.
    """

    def __init__(self, model: Any, tokenizer: Any, users: int, prefill_step: int) -> None:
        self._tokenizer = tokenizer
        self._users = users
        self._running: dict[int, tuple[Ticket, Answer]] = {}
        self._batch: Any = BatchGenerator(
            model,
            completion_batch_size=users,
            prefill_batch_size=min(users, PREFILL_TOGETHER),
            prefill_step_size=prefill_step,
        )

    def __len__(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether as many requests run as there are users."""
        return len(self) >= self._users

    def add(self, ticket: Ticket) -> None:
        """Starts on a request."""
        job = ticket.job
        answer = Answer(job, self._tokenizer, ticket.asked)
        (number,) = self._batch.insert(
            [job.tokens],
            # The answer says when it is finished. mlx-lm would also extract its cache then.
            max_tokens=[job.max_tokens + 1],
            samplers=[job.sampling.sampler()],
            logits_processors=[job.sampling.processors()],
        )
        self._running[number] = ticket, answer

    def remove(self, ticket: Ticket) -> None:
        """Frees the caches of a request, wherever it is; none of ours is let be."""
        numbers = [n for n, (running, _) in self._running.items() if running is ticket]
        for number in numbers:
            self._batch.remove([number])
            del self._running[number]

    def step(self) -> list[Ticket]:
        """One decode step and one chunk of prefill; returns the requests that have ended."""
        _, responses = self._batch.next()
        ended = []
        for response in responses:
            ticket, answer = self._running[response.uid]
            try:
                ticket.send(answer.add(response.token, response.logprobs))
            except Exception as error:  # one answer's odd text must not end the others
                log.exception("an answer's text failed")
                ticket.end(StageError(f"the answer can't be read: {type(error).__name__}: {error}"))
                ended.append(ticket)
            else:
                if answer.finished:
                    ticket.end()
                    ended.append(ticket)
        for ticket in ended:
            self.remove(ticket)
        return ended

    def close(self) -> None:
        """Gives back the memory limit that mlx-lm has raised."""
        self._batch.close()
