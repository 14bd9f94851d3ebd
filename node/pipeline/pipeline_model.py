"""The cluster as one mlx-lm model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from node.metering.timeline import Timeline, recording
from node.metering.trips import Trip, Trips
from node.mlx.compat_caches import commit, members
from node.mlx.prebuilt import Kind, PrebuiltStep, StepBuilder, kind_of_array, kind_of_leaves
from node.mlx.tensors import decode_tree, encode_tree
from node.pipeline.choosers import Chooser, check_chosen, settle
from node.pipeline.pending_logits import PendingLogits
from node.pipeline.remote_cache import RemoteCache, RemoteStage
from node.prefixes.store import PrefixStore
from node.ring.compute_thread import begin
from node.ring.leaves import leaf_bytes
from node.ring.ring import PrefillWindow, Reply, Ring, Window
from node.speculation.depth import PipeTimes
from unicluster import failpoints
from unicluster.deadlines import DECODE, PREFILL, Work
from unicluster.errors import UniclusterError
from unicluster.v1.stage_pb2 import CacheOp, Choice, Frame, HopMessage, StageReport

# Up to this many tokens a forward's result is sent back unasked: decode and speculative
# verification need it. Of longer ones, prefill, it rarely is: the last stage keeps it back.
PUSHED_TOKENS = 16
# Frames of several tokens, before what they cost is believed.
GROWTHS = 3
# Frames of decode on their progress: far more than lanes, each of which has one.
PUSHED_FRAMES = 64


@dataclass
class _ExpectedCall:
    """The last decode call over some caches, after which the next is expected.

    local: caches of the layers here. tokens, returned: kinds of its input and of its reply. step:
    the next decode step, if it was prebuilt.
    """

    local: list[Any]
    tokens: Kind
    returned: Kind = ()
    step: PrebuiltStep | None = None

    def is_met(self, local: list[Any], tokens: Kind) -> bool:
        same = all(cache is other for cache, other in zip(self.local, local, strict=True))
        return same and self.tokens == tokens


class Front(Protocol):
    """Stage 0: a HollowModel, or what stands for one in another engine."""

    @property
    def cache_view(self) -> Any:
        """Makes the caches of its layers."""

    @property
    def model(self) -> Any:
        """The complete model, where all layers are here."""

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's layer output."""

    @property
    def vocabulary(self) -> int:
        """Tokens that the last stage has logits of, and can choose from; 0: it has none."""

    @property
    def shares_copies(self) -> bool:
        """Whether copies of its caches share what grows with the tokens."""

    @property
    def threads(self) -> int:
        """Threads that compute a token; 0 where that is the engine's own affair."""

    def keep_prefixes(self, store: PrefixStore | None) -> None:
        """Tells it where its own prefixes on disk are, if they are its own affair."""

    def front(self, inputs: mx.array, caches: list[Any], /) -> tuple[Any, list[Any]]:
        """Output of its last layer, and further arrays to evaluate with it."""

    def final_logits(self, inputs: mx.array, received: Any, caches: list[Any], /) -> mx.array:
        """Logits of the activations `received` from the last stage."""


class PipelineModel(nn.Module):
    """Layers here and on other machines behind the interface of an mlx-lm model.

    Use it from one thread, like any MLX model. `ring` is None when all layers are here. `trips`
    measures the other stages; `machine` is this one's name. `prebuilt`: decode steps are built
    before their input arrives.
    """

    def __init__(
        self,
        hollow: Front,
        ring: Ring | None,
        machine: str = "head",
        *,
        prebuilt: bool = True,
    ) -> None:
        super().__init__()
        self.trips = Trips([machine, *(stop.node for stop in ring.route)] if ring else [machine])
        self.model = hollow.model
        self._hollow = hollow
        self._ring = ring
        self._step_builder = StepBuilder(prebuilt)
        self._lock = threading.Lock()
        self._dropped: deque[int] = deque()
        self._flush_due = False
        count = len(ring.route) if ring is not None else 0
        # One prefill chunk a stage keeps all busy. More would only wait in a stage's queue, and a
        # frame of decode behind them.
        self.prefill_window = PrefillWindow(count + 1)
        self._steps = Window(PUSHED_FRAMES)
        self._remotes = [
            RemoteStage(index, self._ask, self._on_free) for index in range(1, count + 1)
        ]

    @property
    def layers(self) -> list[Any]:
        """One element for each cache of this model: mlx-lm takes the length for that of a cache."""
        return [*range(len(self._hollow.cache_view)), *self._remotes]

    @property
    def args(self) -> Any:
        """The configuration object of the model's own class."""
        return self.model.args

    @property
    def stages(self) -> int:
        """Number of machines that compute, this one included."""
        return len(self._remotes) + 1

    @property
    def cuts(self) -> list[list[Any]]:
        """Layers [first, end) and engine of each other stage, in order."""
        stages = self._ring.stages.stages if self._ring is not None else []
        return [[each.first_layer, each.end_layer, each.engine] for each in stages]

    @property
    def saves(self) -> bool:
        """Whether all other stages can keep prefixes on their disks."""
        return self._ring is None or all(stage.saves for stage in self._ring.stages.stages)

    @property
    def failure(self) -> UniclusterError | None:
        """Why the ring has ended; None while it goes on."""
        return self._ring.failure if self._ring is not None else None

    @property
    def vocabulary(self) -> int:
        """Tokens of which the last stage has the logits; 0: the head makes them."""
        return self._hollow.vocabulary

    @property
    def chooses(self) -> bool:
        """Whether calls may have choosers: tokens are then chosen where the logits are."""
        return self.vocabulary > 0

    def layer_caches(self) -> list[Any]:
        """A fresh cache of each layer of the whole model, which shows their kinds."""
        fresh: list[Any] = self._hollow.cache_view.fresh()
        return fresh

    def make_cache(self) -> list[Any]:
        """The caches of the layers here, then one handle for each remote stage."""
        return [*self._hollow.cache_view.make(), *(remote.make() for remote in self._remotes)]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        choosers: Sequence[Chooser] = (),
    ) -> Any:
        """Logits (batch, tokens, vocabulary) for token ids (batch, tokens).

        Returns an array, or, when there are remote stages, PendingLogits. With `choosers`, one for
        each token, row by row, those are settled by the time the logits are there, which are then
        of use only to choosers that were settled with None. Not for prefill. Errors of the ring
        (StageError, UnavailableError) are raised here or when the logits are touched.
        """
        if cache is None:
            cache = self.make_cache()
        here = len(self._hollow.cache_view)
        local = cache[:here]
        prefill = inputs.shape[1] > PUSHED_TOKENS
        begin(Work(PREFILL, inputs.size) if prefill else DECODE)
        failpoints.reach("head.compute")
        timelines = recording()
        if self._ring is None:
            began = time.perf_counter()
            self.trips.head.frames += 1
            more = {"choosers": choosers} if choosers else {}
            logits = self.model(inputs, cache=self._hollow.cache_view.full(local), **more)
            if timelines:
                mx.eval(logits)
                _add(timelines, "layers", began)
            return logits
        for remote, index in zip(self._remotes, range(here, len(cache)), strict=True):
            if members(cache[index]) is not None:
                cache[index] = remote.store(cache[index])
        handles = cache[here:]
        if prefill:
            return self._prefill(inputs, local, handles, timelines)
        return self._step(inputs, local, handles, timelines, choosers)

    def _prefill(
        self,
        inputs: mx.array,
        local: list[Any],
        handles: list[RemoteCache],
        timelines: Sequence[Timeline],
    ) -> PendingLogits:
        """Sends a chunk of a prompt, whose result stays on the last stage until claimed."""
        handles[0].expected = None
        self.prefill_window.enter()
        began = time.perf_counter()
        message = HopMessage(frame=Frame(hold=True))
        try:
            hidden, extra = self._hollow.front(inputs, local)
            encode_tree(hidden, message.frame.hidden, extra)
        except BaseException:
            self.prefill_window.give_up()
            raise
        self.prefill_window.depart()
        reply = self._forward(message, handles, self.prefill_window, (), began, timelines)
        number = reply.number

        def resolve() -> mx.array:
            reply.wait()
            woke = _woke(timelines, number)
            frame = self._send(HopMessage(frame=Frame(claim=number))).wait()
            logits = self._hollow.final_logits(inputs, decode_tree(frame.hidden), local)
            return _finished(logits, timelines, woke, number)

        return PendingLogits(resolve, lambda: self._drop(number), reply)

    def _step(
        self,
        inputs: mx.array,
        local: list[Any],
        handles: list[RemoteCache],
        timelines: Sequence[Timeline],
        choosers: Sequence[Chooser],
    ) -> PendingLogits:
        """Decodes or verifies drafted tokens; builds the next step while other stages compute."""
        self._steps.enter()
        began = time.perf_counter()
        choices = [chooser.ask(self._hollow.vocabulary) for chooser in choosers]
        message = HopMessage(frame=Frame(choices=choices))
        try:
            before, handles[0].expected = handles[0].expected, None
            expected = _ExpectedCall(local, kind_of_array(inputs))
            if before is not None and not before.is_met(local, expected.tokens):
                before = None  # its step references the caches' arrays, and MLX would copy them
            if before is not None and before.step is not None:
                before.step.placeholder.fill_array(inputs)
                commit(local, before.step.shadows)
                hidden, extra = before.step.result, before.step.extra
            else:
                hidden, extra = self._hollow.front(inputs, local)
            encode_tree(hidden, message.frame.hidden, extra)
        except BaseException:
            self._steps.leave()
            raise
        reply = self._forward(
            message, handles, self._steps, inputs.shape, began, timelines, choices
        )
        handles[0].expected = expected
        returned = before.returned if before is not None else ()

        def resolve() -> mx.array:
            prebuilt = None
            if returned and not reply.is_back:
                # Not before: building would take the interpreter from the frame's sending.
                reply.wait_until_sent()
                prebuilt = self._prebuilt_lm_head(inputs, returned, local)
                if handles[0].expected is expected:
                    expected.step = self._step_builder.build(
                        expected.tokens, local, self._hollow.front
                    )
            frame = reply.wait()
            woke = _woke(timelines, reply.number)
            expected.returned = kind_of_leaves(frame.hidden)
            chosen = settle(frame, choosers, inputs.shape, self._hollow.vocabulary)
            if chosen is not None:
                logits = chosen
            elif prebuilt is not None and prebuilt.kind == expected.returned:
                prebuilt.placeholder.fill(frame.hidden)
                logits = prebuilt.result
            else:
                logits = self._hollow.final_logits(inputs, decode_tree(frame.hidden), local)
            return _finished(logits, timelines, woke, reply.number)

        return PendingLogits(resolve, progress=reply)

    def _prebuilt_lm_head(
        self, inputs: mx.array, returned: Kind, local: list[Any]
    ) -> PrebuiltStep | None:
        def build(received: Any, _: list[Any]) -> tuple[mx.array, list[Any]]:
            return self._hollow.final_logits(inputs, received, local), []

        return self._step_builder.build(returned, [], build)

    @property
    def copies_states(self) -> bool:
        """Whether all other stages can make a snapshot for each guess: ggml has too few places."""
        ring = self._ring
        return ring is not None and all(s.engine in ("", "mlx") for s in ring.stages.stages)

    @property
    def shares_copies(self) -> bool:
        """Whether copied caches share on all stages what grows with the tokens, as ggml's do."""
        ring = self._ring
        stages = ring.stages.stages if ring is not None else ()
        return self._hollow.shares_copies and all(stage.engine == "ggml" for stage in stages)

    def pipe_times(self, head_s: float) -> PipeTimes:
        """Seconds of one answer's token, as lately measured; `head_s` of them at the head."""
        stages = [stage.decode.median for stage in self.trips.stages]
        grown = [stage.growth for stage in self.trips.stages]
        known = all(growth.count >= GROWTHS for growth in grown)
        return PipeTimes(
            (head_s, *stages),
            sum(hop.decode.median for hop in self.trips.hops),
            max(0.0, *(growth.median for growth in grown)) if known and grown else None,
        )

    def cancel(self, frames: Iterable[PendingLogits]) -> None:
        """Has stages skip these decode frames where they have not begun them.

        Their logits must not be used, and their tokens are to be rolled back next.
        """
        numbers = [each.progress.number for each in frames if isinstance(each.progress, Reply)]
        if self._ring is not None and numbers:
            self._ring.cancel(numbers)

    def live_caches(self) -> int:
        """Cache handles alive on all remote stages together, after all frees so far."""
        query = CacheOp(query=CacheOp.Query())
        return sum(remote.ask(query).answer.live for remote in self._remotes)

    def _forward(
        self,
        message: HopMessage,
        handles: Sequence[RemoteCache],
        window: Window,
        shape: tuple[int, ...],
        began: float,
        timelines: Sequence[Timeline],
        choices: Sequence[Choice] = (),
    ) -> Reply:
        """Sends a frame; `shape` is that of its tokens (answers, tokens) in decode, else empty."""
        versions = [handle.before_forward() for handle in handles]
        sent = time.perf_counter()
        alone = shape[1] if shape and shape[0] == 1 else 0
        returned = 0.0

        def trip(frame: Frame) -> Trip:
            size = leaf_bytes(frame.hidden)
            drafted, handed = max(alone - 1, 0), frame.handed_s
            return Trip(sent, returned, size, alone == 1, frame.reports, drafted, handed)

        def on_reply(frame: Frame) -> None:
            nonlocal returned
            returned = time.perf_counter()
            check_chosen(frame, choices, self._hollow.vocabulary)
            for handle, version, report in zip(handles, versions, frame.reports, strict=True):
                if not report.skipped:
                    handle.after_forward(version, report)
            for timeline in timelines:
                timeline.note(frame.id, trip(frame), self.trips)

        def after(frame: Frame) -> None:
            self.trips.note(trip(frame))

        numbers = {handle.stage.index: handle.number for handle in handles}
        reply = self._send(message, caches=numbers, window=window, on_reply=on_reply, after=after)
        for timeline in timelines:
            timeline.add("layers", began, sent, reply.number)
        return reply

    def _send(
        self,
        message: HopMessage,
        *,
        caches: dict[int, int] | None = None,
        window: Window | None = None,
        on_reply: Callable[[Frame], None] | None = None,
        after: Callable[[Frame], None] | None = None,
        last: tuple[RemoteStage, CacheOp] | None = None,
    ) -> Reply:
        """Sends a frame with all operations recorded until now, and `last` after them."""
        ring = self._ring
        assert ring is not None  # noqa: S101
        frame = message.frame
        with self._lock:
            if last is not None:  # not before: another frame could take it along
                last[0].operations.append(last[1])
            for remote in self._remotes:
                operations = list(_drained(remote.operations))
                number = (caches or {}).get(remote.index, 0)
                if operations or number:
                    frame.parts.add(stage=remote.index, ops=operations, cache=number)
            frame.dropped.extend(_drained(self._dropped))
            return ring.send(message, window=window, on_reply=on_reply, after=after)

    def _ask(self, remote: RemoteStage, operation: CacheOp) -> StageReport:
        frame = self._send(HopMessage(), last=(remote, operation)).wait()
        return next(report for report in frame.reports if report.stage == remote.index)

    def _drop(self, number: int) -> None:
        """Frees a result that is held for the head, by the next frame: nobody will claim it.

        Called by the garbage collector at any moment: takes no lock.
        """
        self._dropped.append(number)
        self._on_free()

    def _on_free(self) -> None:
        """Sends frees in a frame of their own shortly, unless a forward carries them first."""
        if not self._flush_due and self._ring is not None and self._ring.failure is None:
            self._flush_due = True
            self._ring.call_later(0.05, self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._dropped or any(remote.operations for remote in self._remotes):
            self._send(HopMessage())


def _woke(timelines: Sequence[Timeline], number: int) -> float:
    """Records that the head continues with a returned frame; returns the time."""
    now = time.perf_counter() if timelines else 0.0
    for timeline in timelines:
        timeline.woke(number, now)
    return now


def _finished(
    logits: mx.array, timelines: Sequence[Timeline], woke: float, number: int
) -> mx.array:
    """The logits, evaluated if they are timed."""
    if timelines:
        mx.eval(logits)
        _add(timelines, "head", woke, number)
    return logits


def _add(timelines: Sequence[Timeline], name: str, began: float, trip: int = 0) -> None:
    for timeline in timelines:
        timeline.add(name, began, time.perf_counter(), trip)


def _drained(items: deque[Any]) -> Any:
    while items:
        yield items.popleft()
