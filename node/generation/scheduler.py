"""Scheduling of queue, prefill and lanes, on the MLX thread.

A request waits for a place in a lane; its prompt is prefilled, in turns with other prompts, and
then its answer decodes in the lane. Prefill is one fiber and each lane another: while a step of
one lane is on other machines, the others compute.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from node.generation.answer import Answer
from node.generation.batch import BatchDecoder, can_batch
from node.generation.chunking import CROSSOVER_TOKENS, GPU_CROSSOVER_TOKENS, ChunkSizer, FirstChunks
from node.generation.config import GenerationConfig
from node.generation.kv_budget import KVBudget
from node.generation.lane import Decoder, Lane
from node.generation.moving import MovingDecoder
from node.generation.piped import PipedDecoder, pipes
from node.generation.prefix_cache import (
    CHECKPOINTS,
    CachedPrefix,
    PrefixCache,
    branchings,
    mark_ids,
)
from node.generation.sequence import Sequence
from node.generation.single import SingleDecoder
from node.generation.ticket import Ticket
from node.metering.meters import AnswerMeter
from node.metering.timeline import Timeline, recorded
from node.mlx.kv_quant import quantize
from node.mlx.memory import give_all_back, give_back
from node.mlx.rollback import trimmable_below
from node.pipeline.choosers import UNREAD
from node.pipeline.disk_prefixes import DiskPrefixes
from node.pipeline.idle_saving import IdleSaving
from node.pipeline.pending_logits import PendingLogits
from node.pipeline.pipeline_model import PUSHED_TOKENS
from node.prefixes.index import MIN_TOKENS, DiskPrefix
from node.ring.compute_thread import MLXThread, give_way, pause, rested
from node.speculation.pace import Pace
from unicluster.causes import Cause, of_error
from unicluster.errors import UniclusterError

# Prefixes on disk that are tried for one prompt.
MOST_RECALLS = 3
# Between two looks whether all sequences have left.
SETTLE_LOOK_SECONDS = 0.01

log = logging.getLogger("unicluster.scheduler")


class Scheduler:
    """Serves one model until closed.

    `kv_bytes` of its configuration is the KV budget of all machines together, enough for `users`
    answers at the full context: an answer's part is reserved before it begins, and the rest holds
    the prefix cache. 0: unknown; nothing is cached. With `kv_bits`, or several guesses in a frame,
    each lane holds one answer. `on_end` is called for each ticket that has ended, `on_error` at
    most once, with the exception of the model: then all answers are lost. `clock` returns seconds;
    simulations pass their own. `prefilled` counts prompt tokens computed, in `chunks`; `meter`
    counts the rest.
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
        speculation, piped = config.speculation, pipes(model, config)
        batches = can_batch(kinds) and not spec.kv_bits
        # On one machine a lone answer decodes as fast without.
        batches = batches and (speculation is None or piped or speculation.auto)

        def decoder(places: int) -> Decoder:
            if batches and not piped:
                return BatchDecoder(model)
            if not piped:
                return SingleDecoder(model, kinds, config, tokenizer.eos_token_ids)
            alone = PipedDecoder(model, kinds, config, tokenizer.eos_token_ids, self._share)
            self.paces.append(alone.pace)
            return MovingDecoder(BatchDecoder(model), alone) if places > 1 else alone

        self.paces: list[Pace] = []  # of the lanes that guess through the pipe
        self._stages = int(getattr(model, "stages", 1))
        lanes = min(spec.lanes or self._stages, users) if batches else users
        self.waiting: deque[Ticket] = deque()
        places = [users // lanes + (index < users % lanes) for index in range(lanes)]
        keep = self._cache_answer if spec.kv_bytes else None
        self.lanes = [Lane(decoder(count), count, keep) for count in places]
        self._trimmable_below = trimmable_below(kinds)
        self.kv_budget = KVBudget(spec.kv_bytes, users, spec.context, kinds)
        self.prefix_cache = PrefixCache()
        # Of caches that can't be trimmed the whole is reused: so some are kept on the way.
        copies = bool(getattr(model, "shares_copies", False))
        self._checkpoints = copies and bool(spec.kv_bytes) and not self.kv_budget.grows
        # Of running answers: stages of ggml have states for these, and what is cached for reuse.
        self._most_checkpoints = users + CHECKPOINTS - 1
        self._marks = mark_ids(tokenizer) if self._checkpoints else frozenset()
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
        crossover = GPU_CROSSOVER_TOKENS if mx.default_device() == mx.gpu else CROSSOVER_TOKENS
        self._sizer = ChunkSizer(config.prefill_step, self._stages, crossover)
        # The last chunks of a prompt may come back while other prompts begin.
        self._first_chunks: deque[FirstChunks] = deque(maxlen=users)
        self._closed = False
        prefixes = config.prefixes if spec.kv_bytes else None
        self._disk: DiskPrefixes | None = None
        self._idle: IdleSaving | None = None
        if prefixes is not None:
            self._disk = DiskPrefixes(model, prefixes, spec.ring_prefill_s)
            workload = prefixes.store.workload
            self._idle = IdleSaving(self._disk, workload, self.prefix_cache, self._start)

    def add(self, ticket: Ticket) -> None:
        """Queues a request: behind those that broke off elsewhere, which have waited before."""
        resumed = ticket.job.resumed
        if resumed is not None and resumed.progress.reason:  # nothing but its Finish was lost
            answer = Answer(ticket.job, self._tokenizer, ticket.asked, self.meter)
            ticket.send([answer.finish()])
            ticket.end()
            self._on_end(ticket)
            return
        if ticket.job.broke_off:
            self.waiting.insert(sum(each.job.broke_off for each in self.waiting), ticket)
        else:
            self.waiting.append(ticket)
        self._schedule()

    def drop(self, ticket: Ticket) -> None:
        """Removes an ended request from the queue; a running one leaves at its next step."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def close(self) -> None:
        """Releases everything; fibers that wait for another machine end when they wake."""
        self._closed = True
        if self._idle is not None:
            self._idle.close()
        for lane in self.lanes:
            lane.close()
        self.lanes.clear()
        self.prefix_cache.clear()
        self.waiting.clear()
        self._prompts.clear()

    def settle(self, seconds: float) -> None:
        """Waits until all sequences have left, or for `seconds`; on the compute thread, as a fiber.

        Then caches of those that were cancelled are among the prefixes.
        """
        until = time.monotonic() + seconds
        while any(lane.sequences for lane in self.lanes) and time.monotonic() < until:
            pause(SETTLE_LOOK_SECONDS)

    @property
    def reserved(self) -> int:
        """KV bytes reserved for running answers; places in the lanes keep it within the budget."""
        return sum(
            # Copies, because other threads ask too.
            self.kv_budget.batch_bytes(sequence.most for sequence in list(lane.sequences))
            for lane in list(self.lanes)
        )

    def _share(self, frames: int) -> int:
        """One answer's part of the frames that fill the pipe: one while a prompt needs room."""
        decoding = sum(lane.busy for lane in self.lanes)
        return 1 if self._prefilling else max(1, frames // max(decoding, 1))

    def _schedule(self) -> None:
        """Starts requests in order of arrival, each in the lane with the fewest sequences."""
        while self.waiting:
            lane = max(self.lanes, key=lambda lane: (lane.free > 0, -len(lane.sequences)))
            if not lane.free:
                return
            ticket = self.waiting.popleft()
            if self._idle is not None:
                self._idle.working()
            answer = Answer(ticket.job, self._tokenizer, ticket.asked, self.meter)
            sequence = Sequence(ticket, answer)
            lane.sequences.add(sequence)
            prefix = None
            if not ticket.job.no_reuse:
                resumed = ticket.job.resumed is not None
                sequence.prefix = self.prefix_cache.find(sequence.prompt, once=resumed)
                prefix = self._find_on_disk(sequence)
            self._shrink()
            if prefix is not None:
                self._start(partial(self._recall, sequence, lane, *prefix))
            else:
                self._queue_prompt(sequence, lane)

    def _queue_prompt(self, sequence: Sequence, lane: Lane) -> None:
        self._prompts.append((sequence, lane))
        if not self._prefilling:
            self._prefilling = True
            self._start(self._prefill)

    def _find_on_disk(self, sequence: Sequence) -> tuple[DiskPrefix, int] | None:
        if self._disk is None:
            return None
        in_memory = sequence.prefix[1] if sequence.prefix is not None else 0
        return self._disk.find(np.array(sequence.prompt), more_than=in_memory)

    def _recall(self, sequence: Sequence, lane: Lane, prefix: DiskPrefix, tokens: int) -> None:
        """Gives a sequence a cache from the disks of all stages; other prompts go on meanwhile."""
        cache = None
        for _ in range(MOST_RECALLS):  # one that was not written everywhere, and one before it
            cache = self._disk.recall(prefix, tokens) if self._disk is not None else None
            if self._closed:
                return
            found = self._find_on_disk(sequence) if cache is None else None
            if found is None:
                break
            prefix, tokens = found
        if cache is not None:
            sequence.recalled = cache, tokens
        self._queue_prompt(sequence, lane)

    def _prefill(self) -> None:
        while self._prompts and not self._closed:
            sequence, lane = self._prompts.popleft()
            if sequence.ticket.ended:
                lane.keep_begun(sequence)
                self._finish(sequence, lane)
            elif not sequence.cache:
                self._begin(sequence)
                self._prompts.appendleft((sequence, lane))
                continue
            elif sequence.left > 0:
                decoding = any(lane.decoding for lane in self.lanes)
                first = not sequence.first_chunks
                for chunks in self._first_chunks:
                    chunks.report(self._sizer)
                self._compute(sequence, self._sizer.chunk(len(sequence.prompt), decoding, first))
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
        """Gives a sequence its cache: a copy of a common prefix, or an empty one."""
        if sequence.recalled is not None:
            (sequence.cache, sequence.cached), sequence.recalled = sequence.recalled, None
            self.meter.disk_hits += 1
            self.meter.disk_tokens += sequence.cached
        elif sequence.prefix is None:
            sequence.cache = make_prompt_cache(self._model)
        else:
            (entry, sequence.cached), sequence.prefix = sequence.prefix, None
            if self._checkpoints or entry in self.prefix_cache or self._is_wanted(entry):
                sequence.cache = entry.copy_prefix(sequence.cached)
            else:  # its bytes are no longer counted
                sequence.cache = entry.take_prefix(sequence.cached)
            if self._checkpoints:
                sequence.checkpoints.append(entry)  # the next prompt may begin with it again
        if self._checkpoints and not sequence.job.no_reuse:
            self._choose_branchings(sequence)
        sequence.prefix = None
        sequence.answer.cached_tokens = sequence.cached
        self._first_chunks.append(sequence.first_chunks)
        sequence.ticket.send(sequence.answer.begun())
        if sequence.job.resumed is None:
            self.meter.prompt_tokens += len(sequence.prompt)
            self.meter.reused_tokens += sequence.cached

    def _is_wanted(self, entry: CachedPrefix) -> bool:
        """Whether a sequence that has not begun is to begin with a cached prefix."""
        sequences = (each for lane in self.lanes for each in lane.sequences)
        return any(each.prefix is not None and each.prefix[0] is entry for each in sequences)

    def _compute(self, sequence: Sequence, most: int) -> None:
        """Computes one chunk of a prompt here; other machines continue after this returns."""
        end = sequence.cached + min(most, sequence.left)
        if sequence.branchings:
            end = min(end, sequence.branchings[0])
        chunk = mx.array(sequence.prompt[sequence.cached : end])
        timeline = sequence.answer.timeline
        before = self._spent()
        with recorded("chunk", [timeline] if timeline is not None else []):
            logits = self._model(chunk[None], cache=sequence.cache, **self._unread(len(chunk)))
            quantize(sequence.cache, self._kv_bits)
            mx.eval([cache.state for cache in sequence.cache])
        progress = logits.progress if isinstance(logits, PendingLogits) else None
        sequence.first_chunks.add(len(chunk), self._spent() - before, progress)
        give_back()
        self.prefilled += end - sequence.cached
        self.chunks += 1
        sequence.cached = end
        if sequence.branchings and sequence.branchings[0] == end:
            sequence.branchings.popleft()
            self._add_checkpoint(sequence)

    def _choose_branchings(self, sequence: Sequence) -> None:
        """Where its checkpoints are to be; of all running sequences there are but so many."""
        running = (each for lane in self.lanes for each in lane.sequences)
        there = sum(len(each.checkpoints) + len(each.branchings) for each in running)
        places = branchings(sequence.prompt, self._marks)
        for place in places[max(0, len(places) - self._most_checkpoints + there) :]:
            if place > sequence.cached:
                sequence.branchings.append(place)

    def _add_checkpoint(self, sequence: Sequence) -> None:
        """Keeps the cache as it is now; no data are moved for it."""
        tokens = sequence.prompt[: sequence.cached]
        made, nbytes = copy.deepcopy(sequence.cache), self.kv_budget.share_bytes(len(tokens))
        sequence.checkpoints.append(CachedPrefix(np.array(tokens), made, nbytes, trimmable=False))

    def _unread(self, tokens: int) -> dict[str, Any]:
        """Keeps the logits of a short chunk where they are: nobody reads them."""
        short = tokens <= PUSHED_TOKENS and getattr(self._model, "chooses", False)
        return {"choosers": [UNREAD] * tokens} if short else {}

    def _spent(self) -> float:
        """Seconds by the clock, less those that prefill has waited for other machines."""
        window = getattr(self._model, "prefill_window", None)
        return self._clock() - (window.waited if window is not None else 0.0)

    def _decode(self, lane: Lane) -> None:
        while lane.busy and not self._closed:
            began = self._clock()
            prefilling = self._prefilling
            ended = self._step(lane)
            for sequence in ended:
                self._keep_checkpoints(sequence)
            if self._stages == 1:  # else others ran while the step was in flight
                give_way()
            if lane.decoding:
                self._sizer.note(self._clock() - began, prefilling)
            for sequence in ended:
                self._finish(sequence, lane)
        lane.awake = False
        self._rest()

    def _step(self, lane: Lane) -> list[Sequence]:
        """One step of a lane; its time at the head excludes that in which other fibers ran."""
        began, away = time.perf_counter(), rested()
        alone, tokens = lane.decoding == 1, lane.tokens
        drafted_before = self.meter.drafted_tokens
        traced = lane.timelines
        ended = self._traced_step(lane, traced) if traced else lane.step()
        if alone and lane.tokens == tokens + 1 and self.meter.drafted_tokens == drafted_before:
            self.meter.step.note(time.perf_counter() - began - (rested() - away))
        return ended

    def _traced_step(self, lane: Lane, timelines: list[Timeline]) -> list[Sequence]:
        with recorded("step", timelines):
            ended = lane.step()
            mx.synchronize()  # else the sampling would show in the next step
        return ended

    def _cache_answer(self, tokens: list[int], cache: list[Any]) -> None:
        mx.eval([layer.state for layer in cache])  # else it would keep the whole batch in memory
        size = self.kv_budget.share_bytes if self._checkpoints else self.kv_budget.answer_bytes
        bound = size(len(tokens))
        entry = CachedPrefix(np.array(tokens), cache, nbytes=bound, trimmable=self.kv_budget.grows)
        self.prefix_cache.add(entry)
        self._shrink()
        self._start(partial(self._measure_entry, entry))

    def _measure_entry(self, entry: CachedPrefix) -> None:
        """Replaces the estimated size of an entry by that which the stages report."""
        nbytes = sum(layer.nbytes for layer in entry.cache)
        # A chunked cache says that it can be trimmed when it has dropped what would be needed then.
        short = len(entry.tokens) < self._trimmable_below
        trimmable = short and can_trim_prompt_cache(entry.cache)
        entry.nbytes, entry.trimmable, entry.measured = nbytes, trimmable, True

    def _keep_checkpoints(self, sequence: Sequence) -> None:
        """Caches those of a sequence that has ended, or was cancelled, as prefixes."""
        kept, sequence.checkpoints = sequence.checkpoints, []
        if not kept or sequence.job.no_reuse:
            return
        for entry in kept:
            self.prefix_cache.add(entry, newest=False)
        self._start(self._measure_all)

    def _measure_all(self) -> None:
        for entry in self.prefix_cache:
            if not entry.measured:
                self._measure_entry(entry)
        self._shrink()

    def _shrink(self) -> None:
        """Evicts cached prefixes for which there is no memory; they go to the disks."""
        for entry in self.prefix_cache.shrink(self.kv_budget.total - self.reserved):
            self._save(entry)

    def _save(self, entry: CachedPrefix) -> None:
        if self._disk is not None and len(entry.tokens) >= MIN_TOKENS:
            self._disk.save(entry.tokens, entry.cache, trimmable=entry.trimmable)

    def save_all(self, seconds: float) -> int:
        """Saves all cached prefixes on the disks; returns how many, after `seconds` at most.

        On the compute thread, as a fiber.
        """
        if self._disk is None:
            return 0
        entries = list(self.prefix_cache)
        for entry in entries:
            self._save(entry)
            give_way()
        if not self._disk.settle(seconds):
            log.warning("not all prompt caches were written to disk within %.0f s", seconds)
        return len(entries)

    def _finish(self, sequence: Sequence, lane: Lane) -> None:
        lane.sequences.discard(sequence)
        self._on_end(sequence.ticket)
        if not self._closed:
            self._keep_checkpoints(sequence)
            self._schedule()
            if self._idle is not None and not any(each.sequences for each in self.lanes):
                self._idle.resting()

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
                if of_error(error) is Cause.DRIVER_FAULT and not isinstance(error, UniclusterError):
                    raise  # this process's own device is of no use to it any more: it ends

        self._thread.start(guarded)


def _kinds(model: Any) -> list[Any]:
    """A fresh cache of each layer of the whole model."""
    fresh: list[Any] = model.layer_caches() if hasattr(model, "layer_caches") else []
    return fresh or make_prompt_cache(model)
