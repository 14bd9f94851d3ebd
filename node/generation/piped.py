"""A decoder of one answer whose guesses fill the pipe, in frames of their own.

While one token is on its way round the ring, the tokens guessed after it follow, one behind the
other, or several in a frame where that costs little more. They are verified in order. After a wrong
guess all frames behind it are doomed: stages skip those that they have not begun, and the caches
are rolled back, without asking any stage.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from node.generation.batch import Token
from node.generation.config import GenerationConfig
from node.generation.sampling import TokenChooser
from node.generation.sequence import Sequence
from node.generation.single import Decoding
from node.mlx.rollback import restore, snapshot, trim, trimmable_below, windows_fill_at
from node.ring.compute_thread import give_way, rested
from node.speculation.depth import MOST_FRAMES
from node.speculation.drafting import expected_rates, latest_sort
from node.speculation.gate import CAUTIOUS_RATE, LEAST_RATE, Gate, PipedTimes
from node.speculation.pace import Pace

# Tokens before a cache can't be trimmed any more, from which on each has a frame of its own: none
# of several is on its way when snapshots begin.
ONE_BY_ONE = 12 * MOST_FRAMES


@dataclass
class _Frame:
    """A frame on its way: tokens that are guesses, but for the first if it is the text's last.

    sorts: of its tokens as guesses. choosers: of the token after each. saved: a snapshot of the
    caches before it, where they can't be trimmed.
    """

    tokens: list[int]
    sorts: list[int]
    logits: Any
    choosers: list[TokenChooser]
    saved: list[Any] | None


class PipedDecoder:
    """Decodes one answer at a time, with guesses in flight behind its last token.

    A guess is accepted only if the model chooses it in that place, greedy or sampled: the answer
    is the one without guesses. `kinds` are fresh caches of all layers. Tokens in `ends` are never
    guessed. `share(frames)` is the part of so many frames that this answer may have in flight now.
    """

    def __init__(
        self,
        model: Any,
        kinds: list[Any],
        config: GenerationConfig,
        ends: Collection[int],
        share: Callable[[int], int],
    ) -> None:
        speculation = config.speculation
        if speculation is None:
            raise ValueError("a piped decoder needs drafts")
        self._model = model
        self._chooses = bool(getattr(model, "chooses", False))
        self._trimmable_below = trimmable_below(kinds)
        self._drafter = speculation.drafter()
        self._most = speculation.most
        self._free = speculation.free
        self._snapshots_from = math.inf
        if model.copies_states:
            # By itself it makes no copies, which the plan doesn't count: of a full window only what
            # a token overwrites is saved.
            self._snapshots_from = windows_fill_at(kinds) if speculation.auto else 0
        self._ends = ends
        self._share = share
        self._run: Decoding | None = None
        unknown = CAUTIOUS_RATE if self._free else LEAST_RATE
        self.pace = Pace(model.pipe_times, PipedTimes(unknown))
        self._gate = self._new_gate()
        self._flight: deque[_Frame] = deque()
        self._drafts: deque[int] = deque()  # proposed after those in flight, and not sent yet
        self._sort = 0  # of these
        self._wrong = False  # the last guess was

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence; there must be no other."""
        self._run = Decoding(sequence)
        self._gate = self._new_gate()
        self.pace.begin()
        self._drafts.clear()
        self._wrong = False

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        self._abandon(verified=1)
        sequence.cache = []
        self._run = None

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes it; returns its cache and the tokens in it, those of the answer included."""
        self._abandon(verified=1)
        run, cache = self._run, sequence.cache
        self.remove(sequence)
        return ([], cache) if run is None else (run.tokens[: run.cached], cache)

    def hand_over(self, sequence: Sequence) -> None:
        """Removes a sequence for another decoder."""
        self._abandon(verified=1)
        run, self._run = self._run, None
        if run is not None:
            sequence.hand_over(run.tokens, sequence.cache, run.cached)

    def step(self) -> list[Token]:
        """Fills the pipe, and decodes the tokens of its oldest frame that prove right."""
        run = self._run
        if run is None:
            return []
        began, away = time.perf_counter(), rested()
        guessed = bool(self._flight)
        sent = self._fill(run)
        if self._run is not run:
            return []  # the engine was closed meanwhile
        wide = any(len(frame.tokens) > 1 for frame in self._flight)
        oldest = self._flight.popleft()
        run.look_ahead()
        chosen = list(self._chosen(run, oldest))
        now = time.perf_counter()
        self._note(now, oldest, len(chosen), guessed)
        wrong = len(oldest.tokens) - len(chosen)
        run.sequence.answer.count_drafted(len(oldest.tokens) - 1, len(chosen) - 1)
        for index in range(1, len(chosen) + bool(wrong)):
            self._gate.note(oldest.sorts[index], right=index < len(chosen))
        for _ in chosen:
            self._gate.next_token()
        if wrong:
            self._abandon(behind=wrong)
            for later in reversed(oldest.choosers[len(chosen) :]):  # after those of frames behind
                later.take_back()
            self._wrong = True
        elif self._flight:
            self._verify(run, chosen[-1].token)
        elif self._drafts:
            self._compare(chosen[-1].token)
        self.pace.step(now - began - (rested() - away), 0 if wide else sent)
        return chosen

    def close(self) -> None:
        self._run = None
        self._flight.clear()

    def _new_gate(self) -> Gate:
        expected = expected_rates(self._drafter)
        return Gate(lambda: self.pace.times.least_rate, expected, closed=self._free)

    def _chosen(self, run: Decoding, frame: _Frame) -> Iterator[Token]:
        """The model's choices after each token of a frame, up to the first that was not guessed."""
        for index, chooser in enumerate(frame.choosers):
            token = run.choose(frame.logits[:, index, :], chooser)
            run.cached += 1
            yield token
            if index + 1 < len(frame.tokens) and frame.tokens[index + 1] != token.token:
                return

    def _fill(self, run: Decoding) -> int:
        """Sends frames until as many are in flight as may be; returns how many."""
        sent = 0
        while not self._flight or len(self._flight) < self._depth():
            if self._flight and sent:
                give_way()  # to other answers, and to frames that came back meanwhile
                if self._run is not run or run.sequence.ticket.ended:
                    break
            tokens = [] if self._flight else [run.tokens[-1]]
            sorts = [0] * len(tokens)
            width = self._width(run)
            while len(tokens) < width and (guess := self._guess(run, tokens)) is not None:
                tokens.append(guess)
                sorts.append(self._sort)
            if not tokens:
                break
            self._send(run, tokens, sorts)
            sent += 1
        return sent

    def _send(self, run: Decoding, tokens: list[int], sorts: list[int]) -> None:
        cache = run.sequence.cache
        saved = None
        # Nobody knows how many more will be in the cache when this one turns out to be wrong.
        longest = run.cached + self._in_flight() + MOST_FRAMES
        if self._flight and longest >= self._trimmable_below:
            # From a few tokens before on each frame has one: see ONE_BY_ONE.
            saved = snapshot(cache, single=True)
        choosers = [run.sequence.chooser.ahead() for _ in tokens]
        more = {"choosers": choosers} if self._chooses else {}
        if self._chooses and not self._flight:  # all other tokens are after guesses
            run.mask_ahead(choosers[0])
        logits = self._model(mx.array([tokens]), cache=cache, **more)
        timeline = run.sequence.answer.timeline
        if self._flight and timeline is not None:
            timeline.guess(logits.progress.number)
        self._flight.append(_Frame(tokens, sorts, logits, choosers, saved))

    def _guess(self, run: Decoding, begun: list[int]) -> int | None:
        """The next token to send ahead, behind those of a frame that is begun; None for none."""
        ahead = [token for frame in self._flight for token in frame.tokens]
        ahead = [*ahead, *begun][1:]
        if len(ahead) >= run.room or not (self._free or self._gate.lets_pass()):
            return None
        if not self._drafts:
            count = self._depth() * self._width(run) - len(ahead) - 1
            self._drafts.extend(self._drafter.propose(run.tokens, max(count, 1), ahead))
            self._sort = latest_sort(self._drafter)
        if not self._drafts or self._drafts[0] in self._ends:
            return None
        if not self._gate.lets_pass(self._sort):
            return None
        if len(run.allowed([*ahead, self._drafts[0]])) <= len(ahead):
            return None
        return self._drafts.popleft()

    def _verify(self, run: Decoding, token: int) -> None:
        """Compares the model's choice with the guess in flight, and rolls a wrong one back."""
        first = self._flight[0]
        right = first.tokens[0] == token
        self._gate.note(first.sorts[0], right=right)
        self._wrong = not right
        if right:
            run.sequence.answer.count_drafted(1, 1)
        else:
            self._abandon()

    def _compare(self, token: int) -> None:
        """Compares the model's choice with a draft that was not sent."""
        right = self._drafts.popleft() == token
        if self._free:
            self._gate.note(self._sort, right=right)
        if self._free or not right:  # those after a longer match are of a better sort
            self._drafts.clear()

    def _abandon(self, verified: int = 0, behind: int = 0) -> None:
        """Dooms all frames in flight, and takes their tokens out of the caches.

        `verified`: tokens that were guesses and proved right before. `behind`: wrong tokens of the
        frame that came back last.
        """
        self._drafts.clear()
        run, doomed = self._run, list(self._flight)
        count = self._in_flight()
        self._flight.clear()
        if run is None or not count + behind:
            return
        if count:
            run.sequence.answer.count_drafted(count - verified, 0)
            for frame in reversed(doomed):
                for chooser in reversed(frame.choosers):
                    chooser.take_back()
            self._model.cancel(frame.logits for frame in doomed)
        saved = doomed[0].saved if doomed else None
        if saved is not None:
            later = [frame.saved for frame in doomed[1:] if frame.saved is not None]
            restore(run.sequence.cache, saved, count, later)
        else:
            trim(run.sequence.cache, count + behind)

    def _in_flight(self) -> int:
        return sum(len(frame.tokens) for frame in self._flight)

    def _depth(self) -> int:
        run = self._run
        tokens = run.cached if run is not None else 0
        snapshots = tokens + 2 * MOST_FRAMES >= self._trimmable_below
        if snapshots and tokens <= self._snapshots_from:
            return 1
        return max(1, self._share(self.pace.depth))

    def _width(self, run: Decoding) -> int:
        if run.cached + self._in_flight() + ONE_BY_ONE >= self._trimmable_below:
            return 1
        return self.pace.width(self._gate.rate(self._sort), self._depth(), self._most)

    def _note(self, now: float, frame: _Frame, chosen: int, guessed: bool) -> None:
        """Notes the time of a frame's chosen tokens."""
        times = self.pace.times
        if guessed or chosen > 1:
            kind = times.right
        elif self._flight:
            kind = times.behind
        elif self._wrong or len(frame.tokens) > 1:
            kind = times.wrong
        else:
            kind = times.plain
        self._wrong = False
        self.pace.token(now, chosen, kind, alone=self._share(MOST_FRAMES) == MOST_FRAMES)


def pipes(model: Any, config: GenerationConfig) -> bool:
    """Whether answers are to be decoded so: there are other stages, whose caches can follow."""
    speculation = config.speculation
    if speculation is None or not speculation.piped or config.spec.kv_bits:
        return False
    return int(getattr(model, "stages", 1)) > 1 and hasattr(model, "pipe_times")
