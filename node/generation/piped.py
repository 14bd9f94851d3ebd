"""A decoder of one answer whose guesses fill the pipe, each a frame of its own.

While one token is on its way round the ring, the tokens guessed after it follow, one behind the
other. They are verified in order. After a wrong guess all frames behind it are doomed: stages skip
those that they have not begun, and the caches are rolled back, without asking any stage.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from node.generation.batch import Token
from node.generation.config import GenerationConfig
from node.generation.sampling import TokenChooser
from node.generation.sequence import Sequence
from node.generation.single import Decoding
from node.mlx.rollback import restore, snapshot, trim, trimmable_below
from node.ring.compute_thread import give_way, rested
from node.speculation.depth import MOST_FRAMES, RECENT_WEIGHT
from node.speculation.gate import Gate, PipedTimes

# Steps after which the depth of the pipe follows what was measured.
MEASURED_STEPS = 16


@dataclass
class _Frame:
    """A frame on its way, with one token: the last of the text, or a guess.

    chooser: of the token after it. saved: a snapshot of the caches before it, where they can't be
    trimmed.
    """

    token: int
    logits: Any
    chooser: TokenChooser
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
        self._free = speculation.free
        # By itself it takes no memory that the plan doesn't count.
        self._snapshots = model.copies_states and not speculation.auto
        self._ends = ends
        self._share = share
        self._run: Decoding | None = None
        self._times = PipedTimes()
        self._gate = Gate(lambda: self._times.least_rate)
        self._flight: deque[_Frame] = deque()
        self._drafts: deque[int] = deque()  # proposed after those in flight, and not sent yet
        self._wrong = False  # the last guess was
        self._chosen_at: float | None = None  # when the last token was, if nobody else computed
        self._steps = 0
        self._frame_s = 0.0  # the head's time for a frame, a running mean
        self._deepest = model.pipe_times(0.0).depth()

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence; there must be no other."""
        self._run = Decoding(sequence)
        self._gate = Gate(lambda: self._times.least_rate)
        self._drafts.clear()
        self._wrong, self._chosen_at = False, None

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
        """Fills the pipe, and decodes one token more."""
        run = self._run
        if run is None:
            return []
        began, away = time.perf_counter(), rested()
        guessed = bool(self._flight)
        sent = self._fill(run)
        if self._run is not run:
            return []  # the engine was closed meanwhile
        oldest = self._flight.popleft()
        run.look_ahead()
        chosen = run.choose(oldest.logits[:, -1, :], oldest.chooser)
        run.cached += 1
        now = time.perf_counter()
        self._note(now, guessed)
        self._gate.next_token()
        if self._flight:
            self._verify(run, chosen.token)
        elif self._drafts:
            self._compare(chosen.token)
        self._measure(now - began - (rested() - away), sent)
        return [chosen]

    def close(self) -> None:
        self._run = None
        self._flight.clear()

    def _fill(self, run: Decoding) -> int:
        """Sends frames until as many are in flight as may be; returns how many."""
        sent = 0
        while not self._flight or len(self._flight) < self._depth():
            if not self._flight:
                token: int | None = run.tokens[-1]
            elif sent:
                give_way()  # to other answers, and to frames that came back meanwhile
                if self._run is not run or run.sequence.ticket.ended:
                    break
                token = self._guess(run)
            else:
                token = self._guess(run)
            if token is None:
                break
            self._send(run, token)
            sent += 1
        return sent

    def _send(self, run: Decoding, token: int) -> None:
        cache = run.sequence.cache
        saved = None
        # Nobody knows how many more will be in the cache when this one turns out to be wrong.
        longest = run.cached + len(self._flight) + MOST_FRAMES
        if self._flight and longest >= self._trimmable_below:
            saved = snapshot(cache)
        chooser = run.sequence.chooser.ahead()
        more = {"choosers": [chooser]} if self._chooses else {}
        logits = self._model(mx.array([[token]]), cache=cache, **more)
        self._flight.append(_Frame(token, logits, chooser, saved))

    def _guess(self, run: Decoding) -> int | None:
        """The next token to send ahead; None for none."""
        ahead = [frame.token for frame in self._flight][1:]
        guesses = self._gate.lets_pass
        if len(ahead) >= run.room or not (guesses or self._free):
            return None
        if not self._drafts:
            count = self._depth() - len(self._flight)
            self._drafts.extend(self._drafter.propose(run.tokens, max(count, 1), ahead))
        if not guesses or not self._drafts or self._drafts[0] in self._ends:
            return None
        if len(run.allowed([*ahead, self._drafts[0]])) <= len(ahead):
            return None
        return self._drafts.popleft()

    def _verify(self, run: Decoding, token: int) -> None:
        """Compares the model's choice with the guess in flight, and rolls a wrong one back."""
        right = self._flight[0].token == token
        self._gate.note(right=right)
        self._wrong = not right
        if right:
            run.sequence.answer.count_drafted(1, 1)
        else:
            self._abandon()

    def _compare(self, token: int) -> None:
        """Compares the model's choice with a draft that was not sent."""
        right = self._drafts.popleft() == token
        if self._free:
            self._gate.note(right=right)
        if not right:
            self._drafts.clear()

    def _abandon(self, verified: int = 0) -> None:
        """Dooms all frames in flight, and takes their tokens out of the caches.

        `verified`: frames that were guesses and proved right before.
        """
        self._drafts.clear()
        run, doomed = self._run, list(self._flight)
        self._flight.clear()
        if run is None or not doomed:
            return
        run.sequence.answer.count_drafted(len(doomed) - verified, 0)
        for frame in reversed(doomed):
            frame.chooser.take_back()
        self._model.cancel(frame.logits for frame in doomed)
        saved = doomed[0].saved
        if saved is not None:
            restore(run.sequence.cache, saved, len(doomed))
        else:
            trim(run.sequence.cache, len(doomed))

    def _depth(self) -> int:
        run = self._run
        snapshots = run is not None and run.cached + 2 * MOST_FRAMES >= self._trimmable_below
        if snapshots and not self._snapshots:
            return 1
        return max(1, self._share(self._deepest))

    def _measure(self, seconds: float, sent: int) -> None:
        """Learns how deep the pipe is, by the head's seconds of a step that sent so many frames."""
        if sent:
            each = seconds / sent
            self._frame_s += RECENT_WEIGHT * (each - self._frame_s) if self._frame_s else each
        self._steps += 1
        if self._steps % MEASURED_STEPS == 0:
            pipe = self._model.pipe_times(self._frame_s)
            self._deepest = pipe.depth()
            self._times.expected = pipe.trip, pipe.slowest
            self._times.weigh()

    def _note(self, now: float, guessed: bool) -> None:
        """Notes the time of a token, unless others had a part of the pipe.

        `guessed`: it was computed before the token in front of it was known.
        """
        times = self._times
        before, self._chosen_at = self._chosen_at, None
        if self._share(MOST_FRAMES) == MOST_FRAMES:
            self._chosen_at = now
            if before is not None and (guessed or self._wrong or not self._flight):
                kind = times.right if guessed else times.wrong if self._wrong else times.plain
                kind.note(now - before)
        self._wrong = False


def pipes(model: Any, config: GenerationConfig) -> bool:
    """Whether answers are to be decoded so: there are other stages, whose caches can follow."""
    speculation = config.speculation
    if speculation is None or not speculation.piped or config.spec.kv_bits:
        return False
    return int(getattr(model, "stages", 1)) > 1 and hasattr(model, "pipe_times")
