"""A decoder of one answer at a time: for caches that can't be batched, and for drafted tokens."""

import time
from collections.abc import Collection
from typing import Any

import mlx.core as mx

from node.generation.batch import Token
from node.generation.config import GenerationConfig
from node.generation.sampling import TokenChooser
from node.generation.sequence import Sequence
from node.mlx.kv_quant import quantize
from node.mlx.rollback import restore, snapshot, trim, trimmable_below
from node.pipeline.choosers import UNREAD
from node.pipeline.pipeline_model import PUSHED_TOKENS
from node.speculation.gate import Gate, TripTimes

# Drafted tokens of an answer's first step.
FIRST_DRAFT_LENGTH = 4


class Decoding:
    """State of the answer that is being decoded.

    tokens: the prompt and the answer, of which the first `cached` are in the cache. draft_length:
    tokens to draft in the next step.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.tokens = list(sequence.prompt)
        self.cached = sequence.cached
        self.draft_length = FIRST_DRAFT_LENGTH
        self._seen = mx.array(self.tokens)
        self._processors = sequence.processors
        self._filters = sequence.job.filters

    @property
    def room(self) -> int:
        """Tokens that may be drafted: one more is always chosen by the model."""
        return self.sequence.most - len(self.tokens) - 1

    def look_ahead(self) -> None:
        """Does for the next choice what needs no logits, while they are being computed."""
        for each in self._filters:
            each.follow(self.tokens[each.taken :])

    def mask_ahead(self, chooser: TokenChooser) -> None:
        """Has a chooser of the token after all that are known send its mask, if that is of use."""
        if chooser.wants_mask:
            self.look_ahead()
            chooser.mask_next()

    def allowed(self, drafts: list[int]) -> list[int]:
        """Drafted tokens up to the first one that the answer's filters forbid."""
        self.look_ahead()
        return drafts[: min((each.allowed(drafts) for each in self._filters), default=len(drafts))]

    def choose(self, logits: mx.array, chooser: TokenChooser) -> Token:
        """The next token, by logits (1, vocabulary): one by one, as without drafted tokens."""
        if not chooser.is_settled:
            for processor in self._processors:
                logits = processor(self._seen, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        drawn: Any = chooser(logprobs)
        if self._processors:
            self._seen = mx.concatenate([self._seen, drawn])
        token = drawn.item()
        self.tokens.append(token)
        return Token(self.sequence, token, logprobs[0])


class SingleDecoder:
    """Decodes one answer at a time, several tokens a step where drafts are accepted.

    A drafted token is accepted only if the model chooses it in that place, greedy or sampled: the
    answer is the one without drafts. `kinds` are fresh caches of all layers. Tokens in `ends` are
    never drafted.
    """

    def __init__(
        self,
        model: Any,
        kinds: list[Any],
        config: GenerationConfig,
        ends: Collection[int] = (),
    ) -> None:
        speculation = config.speculation
        self._model = model
        self._trimmable_below = trimmable_below(kinds)
        self._kv_bits = config.spec.kv_bits
        self._drafter = speculation.drafter() if speculation is not None else None
        self._most = speculation.most if speculation is not None else 0
        self._ends = ends
        self._chooses = bool(getattr(model, "chooses", False))
        self._times = TripTimes()
        self._gate = Gate(lambda: self._times.least_rate)
        self._run: Decoding | None = None

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence; there must be no other."""
        self._run = Decoding(sequence)
        self._gate = Gate(lambda: self._times.least_rate)

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        sequence.cache = []
        self._run = None

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes it; returns its cache and the tokens in it, those of the answer included."""
        run, cache = self._run, sequence.cache
        self.remove(sequence)
        return ([], cache) if run is None else (run.tokens[: run.cached], cache)

    def step(self) -> list[Token]:
        """Decodes the accepted drafts and one token more."""
        run = self._run
        if run is None:
            return []
        began = time.perf_counter()
        cache = run.sequence.cache
        fresh = run.tokens[run.cached :]
        drafts = self._draft(run, most=PUSHED_TOKENS - len(fresh))
        fed = len(fresh) + len(drafts)
        saved = None
        if drafts and run.cached + fed >= self._trimmable_below:
            saved = snapshot(cache)
        choosers = [run.sequence.chooser.ahead() for _ in range(len(drafts) + 1)]
        unread = [UNREAD] * (len(fresh) - 1)
        more = {"choosers": [*unread, *choosers]} if self._chooses else {}
        if self._chooses:
            run.mask_ahead(choosers[0])
        pending = self._model(mx.array([fresh + drafts]), cache=cache, **more)
        run.look_ahead()
        logits = pending[:, len(fresh) - 1 :, :]
        quantize(cache, self._kv_bits)
        chosen = [run.choose(logits[:, 0, :], choosers[0])]
        for index, draft in enumerate(drafts, start=1):
            if chosen[-1].token != draft:
                break
            chosen.append(run.choose(logits[:, index, :], choosers[index]))
        for chooser in reversed(choosers[len(chosen) :]):
            chooser.take_back()
        accepted = len(chosen) - 1
        self._count(run, len(drafts), accepted)
        self._times.note(fed - 1, time.perf_counter() - began)
        if saved is not None and accepted < len(drafts):
            restore(cache, saved, fed)  # what was accepted of it is fed again with the next drafts
        else:
            run.cached += len(fresh) + accepted
            if accepted < len(drafts):
                trim(cache, len(drafts) - accepted)
        return chosen

    def close(self) -> None:
        self._run = None

    def _draft(self, run: Decoding, most: int) -> list[int]:
        count = min(run.draft_length, self._most, run.room, most)
        self._gate.next_token()
        if self._drafter is None or count < 1 or not self._gate.lets_pass():
            return []
        drafts = self._drafter.propose(run.tokens, count)
        end = next((i for i, draft in enumerate(drafts) if draft in self._ends), len(drafts))
        return run.allowed(drafts[:end])

    def _count(self, run: Decoding, drafted: int, accepted: int) -> None:
        if not drafted:
            return
        # Draft more while all are accepted, after a rejected one about as many as were accepted.
        run.draft_length = run.draft_length + 2 if accepted == drafted else accepted + 1
        run.draft_length = min(run.draft_length, self._most)
        for index in range(min(accepted + 1, drafted)):
            self._gate.note(right=index < accepted)
        run.sequence.answer.count_drafted(drafted, accepted)
