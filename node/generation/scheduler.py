"""Who computes next: queue, prefill, lanes. All of it on the MLX thread.

A request waits for a place in a lane; its prompt is prefilled, in turns with other prompts, and
then its answer decodes in the lane. Prefill is one fiber and each lane another: while a step of
one lane is on other machines, the rest computes.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from node.generation.answer import Answer
from node.generation.batch import Batch, can_batch
from node.generation.chunking import GPU_KNEE, KNEE, Beginning, Pace
from node.generation.config import GenerationConfig
from node.generation.kv_budget import Memory
from node.generation.lane import Lane
from node.generation.prefix_cache import Kept, KeptCaches
from node.generation.sequence import Sequence
from node.generation.single import Solo
from node.generation.ticket import Ticket
from node.metering.meters import AnswerMeter
from node.metering.timeline import Timeline, recorded
from node.mlx.kv_quant import quantize
from node.mlx.memory import give_all_back, give_back
from node.pipeline.pending_logits import PendingLogits
from node.ring.compute_thread import MLXThread, give_way, rested


class Scheduler:
    """Serves one model until closed.

    Of its configuration `kv_bytes` is what all machines together have for caches of `users` that
    fill the context: that much is promised before an answer begins, and what is left keeps caches
    of finished ones. 0: not known; nothing is kept. With `kv_bits` or speculation each lane holds
    one answer. `on_end` is called for each ticket that has
    ended, `on_error` at most once, with what the model raised: then all answers are lost.
    `clock` gives seconds: simulations have their own.
    `prefilled` counts prompt tokens computed, in `chunks`; `meter` gets all else.
    """

    def __init__(
        self,
        thread: MLXThread,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        *,
        meter: AnswerMeter,
        on_end: Callable[[Ticket], None],
        on_error: Callable[[Exception], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        spec, users = config.spec, config.spec.users
        kinds = _kinds(model)
        batches = can_batch(kinds) and not spec.kv_bits and config.speculation is None

        def decoder() -> Batch | Solo:
            if batches:
                return Batch(model)
            return Solo(model, kinds, config, tokenizer.eos_token_ids)

        self._stages = int(getattr(model, "stages", 1))
        lanes = min(spec.lanes or self._stages, users) if batches else users
        self.waiting: deque[Ticket] = deque()
        self.lanes = [
            Lane(
                decoder(),
                places=users // lanes + (index < users % lanes) if batches else 1,
                keep=self._keep if spec.kv_bytes else None,
            )
            for index in range(lanes)
        ]
        self.memory = Memory(spec.kv_bytes, users, spec.context, kinds)
        self.kept = KeptCaches()
        self.meter = meter
        self.prefilled = 0
        self.chunks = 0
        self._thread = thread
        self._model = model
        self._tokenizer = tokenizer
        self._kv_bits = spec.kv_bits
        self._on_end = on_end
        self._on_error = on_error
        self._clock = clock
        self._prompts: deque[tuple[Sequence, Lane]] = deque()
        self._prefilling = False
        knee = GPU_KNEE if mx.default_device() == mx.gpu else KNEE
        self._pace = Pace(config.prefill_step, self._stages, knee)
        # Of a prompt that is all on its way the last chunks may come back while others begin.
        self._beginnings: deque[Beginning] = deque(maxlen=users)
        self._closed = False

    def add(self, ticket: Ticket) -> None:
        """Queues a request."""
        self.waiting.append(ticket)
        self._schedule()

    def drop(self, ticket: Ticket) -> None:
        """Takes an ended request out of the queue; a running one leaves at its next step."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def close(self) -> None:
        """Lets go of everything; what waits for another machine does so once it hears of it."""
        self._closed = True
        for lane in self.lanes:
            lane.close()
        self.lanes.clear()
        self.kept.clear()
        self.waiting.clear()
        self._prompts.clear()

    @property
    def promised(self) -> int:
        """KV bytes that the answers begun may come to: never more than there are, with so few
        places in the lanes.
        """
        return sum(
            # Copies, because other threads ask too.
            self.memory.need_together(sequence.most for sequence in list(lane.sequences))
            for lane in list(self.lanes)
        )

    def _schedule(self) -> None:
        """Begins with the requests that came first, each in the lane with the fewest others."""
        while self.waiting:
            lane = max(self.lanes, key=lambda lane: (lane.free > 0, -len(lane.sequences)))
            if not lane.free:
                return
            ticket = self.waiting.popleft()
            answer = Answer(ticket.job, self._tokenizer, ticket.asked, self.meter)
            sequence = Sequence(ticket, answer)
            lane.sequences.add(sequence)
            sequence.kept = None if ticket.job.no_reuse else self.kept.find(sequence.prompt)
            self.kept.shrink(self.memory.total - self.promised)
            self._prompts.append((sequence, lane))
            if not self._prefilling:
                self._prefilling = True
                self._start(self._prefill)

    def _prefill(self) -> None:
        while self._prompts and not self._closed:
            sequence, lane = self._prompts.popleft()
            if sequence.ticket.ended:
                self._finish(sequence, lane)
            elif not sequence.cache:
                self._begin(sequence)
                self._prompts.appendleft((sequence, lane))
                continue
            elif sequence.left > 0:
                decoding = any(lane.decoding for lane in self.lanes)
                first = not sequence.began
                for began in self._beginnings:
                    began.tell(self._pace)
                self._compute(sequence, self._pace.chunk(len(sequence.prompt), decoding, first))
                self._prompts.append((sequence, lane))
            else:
                lane.join(sequence)
                if not lane.awake:
                    lane.awake = True
                    self._start(partial(self._decode, lane))
            give_way()
        self._prefilling = False
        self._rest()

    def _begin(self, sequence: Sequence) -> None:
        """Gives it a cache: of another's tokens, where they are the same."""
        if sequence.kept is None:
            sequence.cache = make_prompt_cache(self._model)
        else:
            kept, sequence.cached = sequence.kept
            sequence.cache, sequence.kept = kept.copied(sequence.cached), None
            sequence.answer.cached_tokens = sequence.cached
        self._beginnings.append(sequence.began)
        self.meter.prompt_tokens += len(sequence.prompt)
        self.meter.reused_tokens += sequence.cached

    def _compute(self, sequence: Sequence, most: int) -> None:
        """One chunk of a prompt; on other machines it goes on after this returns."""
        end = sequence.cached + min(most, sequence.left)
        chunk = mx.array(sequence.prompt[sequence.cached : end])
        timeline = sequence.answer.timeline
        before = self._spent()
        with recorded("chunk", [timeline] if timeline is not None else []):
            logits = self._model(chunk[None], cache=sequence.cache)
            quantize(sequence.cache, self._kv_bits)
            mx.eval([cache.state for cache in sequence.cache])
        way = logits.way if isinstance(logits, PendingLogits) else None
        sequence.began.add(len(chunk), self._spent() - before, way)
        give_back()
        self.prefilled += end - sequence.cached
        self.chunks += 1
        sequence.cached = end

    def _spent(self) -> float:
        """Seconds by the clock, but for those that prefill has waited for other machines."""
        window = getattr(self._model, "prefill_window", None)
        return self._clock() - (window.waited if window is not None else 0.0)

    def _decode(self, lane: Lane) -> None:
        while lane.busy and not self._closed:
            began = self._clock()
            prefilling = self._prefilling
            ended = self._step(lane)
            if self._stages == 1:  # else others ran while the step was on its way
                give_way()
            if lane.decoding:
                self._pace.note(self._clock() - began, prefilling)
            for sequence in ended:
                self._finish(sequence, lane)
        lane.awake = False
        self._rest()

    def _step(self, lane: Lane) -> list[Sequence]:
        """A lane's step, which takes the head its time less that in which others ran."""
        began, away = time.perf_counter(), rested()
        alone, tokens = lane.decoding == 1, lane.tokens
        guessed = self.meter.drafted_tokens
        traced = lane.timelines
        ended = self._traced_step(lane, traced) if traced else lane.step()
        if alone and lane.tokens == tokens + 1 and self.meter.drafted_tokens == guessed:
            self.meter.step.note(time.perf_counter() - began - (rested() - away))
        return ended

    def _traced_step(self, lane: Lane, timelines: list[Timeline]) -> list[Sequence]:
        with recorded("step", timelines):
            ended = lane.step()
            mx.synchronize()  # else the sampling would show in the next step
        return ended

    def _keep(self, tokens: list[int], cache: list[Any]) -> None:
        mx.eval([entry.state for entry in cache])  # else it would hold on to the whole batch
        bound = self.memory.need(len(tokens))
        kept = Kept(np.array(tokens), cache, nbytes=bound, trimmable=self.memory.grows)
        self.kept.add(kept)
        self.kept.shrink(self.memory.total - self.promised)
        self._start(partial(self._weigh, kept))

    def _weigh(self, kept: Kept) -> None:
        """Asks the other machines what it was taken for until now."""
        nbytes = sum(entry.nbytes for entry in kept.cache)
        trimmable = can_trim_prompt_cache(kept.cache)
        kept.nbytes, kept.trimmable = nbytes, trimmable

    def _finish(self, sequence: Sequence, lane: Lane) -> None:
        lane.sequences.discard(sequence)
        self._on_end(sequence.ticket)
        if not self._closed:
            self._schedule()

    def _rest(self) -> None:
        if not self._prefilling and not any(lane.awake for lane in self.lanes):
            give_all_back()

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:
                if not self._closed:
                    self._on_error(error)

        self._thread.start(guarded)


def _kinds(model: Any) -> list[Any]:
    """A fresh cache of each layer, wherever the layer lives."""
    fresh: list[Any] = model.layer_caches() if hasattr(model, "layer_caches") else []
    return fresh or make_prompt_cache(model)
