"""One remote stage: caches by handle, and the two verbs of an engine, apply and forward."""

import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import QuantizedKVCache

from node.mlx.cache_view import Caches
from node.mlx.hollow import HollowModel
from node.mlx.kv_quant import quantized
from node.mlx.memory import give_all_back, give_back
from node.mlx.prebuilt import Foresight, kind_of_leaves
from node.mlx.rollback import restore, snapshot
from node.mlx.tensors import decode_tree, encode_tree, leaf_bytes
from node.ring.session import Session
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, Frame, StagePart, StageReport


class Stage:
    """Serves frames over one hollow model. All calls come from one thread."""

    def __init__(self, hollow: HollowModel, *, foresee: bool = True) -> None:
        """foresee: decode steps are built before their input arrives."""
        self._hollow = hollow
        self._run = hollow.finish if hollow.finishes else hollow.forward
        self._foresight = Foresight(foresee)
        self.computed_tokens = 0  # of prompts and answers that were computed here

    def serve(self, session: Session, frame: Frame, arrived: float) -> None:
        """Does this stage's part of a frame, which becomes the frame for the next hop.

        `arrived` is the time (perf_counter seconds) at which the frame reached the machine.
        Raises whatever the model or a cache raises; the session is then of no more use.
        """
        started = time.perf_counter()
        report = frame.reports.add(
            stage=session.stage,
            arrived_s=arrived,
            queue_s=started - arrived,
            received_bytes=leaf_bytes(frame.hidden),
        )
        freed = False
        for index, part in enumerate(frame.parts):
            if part.stage == session.stage:
                for op in part.ops:
                    for number in _touched(op):
                        session.forget_steps(number)
                    self._apply(session, op, report)
                    freed |= op.HasField("free")
                if part.cache:
                    self._forward(session, part, frame, report)
                del frame.parts[index]
                break
        if session.last:
            for dropped in frame.dropped:
                session.held.pop(dropped, None)
            if frame.claim:
                held = session.held.pop(frame.claim)
                if self._hollow.finishes:
                    held = self._hollow.logits(held)
                encode_tree(held, frame.hidden)
        if freed:
            give_all_back()
        elif frame.hold:
            give_back()
        report.compute_s = time.perf_counter() - started

    def end(self, session: Session) -> None:
        """Frees all that the session has."""
        session.clear()

    def look_ahead(self, session: Session) -> None:
        """Builds the steps that are likely to come: to be called when a frame has left."""
        while session.due:
            number = session.due.popleft()
            kind = session.kinds.get(number)
            if kind and number not in session.foreseen:
                step = self._foresight.step(kind, session.caches[number], self._run)
                if step is not None:
                    session.foreseen[number] = step

    def _forward(
        self, session: Session, part: StagePart, frame: Frame, report: StageReport
    ) -> None:
        number = part.cache
        self.computed_tokens += math.prod(frame.hidden[0].tensor.shape[:2])
        keeps = session.last and frame.hold
        kind = kind_of_leaves(frame.hidden) if not frame.hold else ()
        step = session.foreseen.pop(number, None)
        if step is not None and step.kind == kind:
            step.blank.fill(frame.hidden)
            session.caches[number] = step.after
            result, extra = step.result, step.extra
        else:
            step = None  # it holds on to the caches' arrays, and MLX would copy them
            tree = decode_tree(frame.hidden)
            run = self._hollow.forward if keeps else self._run
            result, extra = run(tree, session.caches[number])
        caches = session.caches[number]
        frame.ClearField("hidden")
        if keeps:
            # A prefill chunk: nobody may ever read it, so only the caches are computed.
            session.held[frame.id] = result
            mx.eval([cache.state for cache in caches], extra)
        else:
            encode_tree(result, frame.hidden, extra)
        if kind and session.kinds.get(number) == kind:
            session.due.append(number)
        session.kinds[number] = kind
        report.trimmable = all(cache.is_trimmable() for cache in caches)
        report.size = _size(caches)

    def _apply(self, session: Session, op: CacheOp, report: StageReport) -> None:
        caches = session.caches
        kind = op.WhichOneof("op")
        if kind == "make":
            caches[op.cache] = self._hollow.cache_view.make()
        elif kind == "merge":
            rows = zip(*(caches[source] for source in op.merge.sources), strict=True)
            caches[op.cache] = [row[0].merge(list(row)) for row in rows]
        elif kind == "filter":
            for cache in caches[op.cache]:
                cache.filter(list(op.filter.rows))
        elif kind == "extend":
            for cache, other in zip(caches[op.cache], caches[op.extend.other], strict=True):
                cache.extend(other)
        elif kind == "extract":
            source = caches[op.extract.source]
            extracted = [cache.extract(op.extract.row) for cache in source]
            # Else it would hold on to the whole batch.
            mx.eval([cache.state for cache in extracted])
            caches[op.cache] = extracted
        elif kind == "prepare":
            for cache in caches[op.cache]:
                cache.prepare(**_prepare_arguments(op.prepare))
        elif kind == "finalize":
            for cache in caches[op.cache]:
                cache.finalize()
            mx.eval([cache.state for cache in caches[op.cache]])
        elif kind == "trim":
            for cache in caches[op.cache]:
                cache.trim(op.trim.tokens)
        elif kind == "copy":
            caches[op.cache] = copy.deepcopy(caches[op.copy.source])
        elif kind == "free":
            caches.pop(op.cache, None)
        elif kind == "query":
            report.answer.CopyFrom(_answer(caches.get(op.cache), len(caches)))
        elif kind == "fetch":
            entry = caches[op.cache][op.fetch.entry]
            report.state.kind = type(entry).__name__
            encode_tree(entry.state, report.state.state)
        elif kind == "store":
            caches[op.cache][op.store.entry] = _stored(op.store)
        elif kind == "quantize":
            source, asked = caches[op.quantize.source], op.quantize
            made = quantized(copy.deepcopy(source), asked.bits, asked.group_size)
            mx.eval([cache.state for cache in made])
            caches[op.cache] = made
        elif kind == "snapshot":
            caches[op.cache] = snapshot(caches[op.snapshot.source])
        elif kind == "restore":
            saved = caches.pop(op.restore.snapshot)
            restore(caches[op.cache], saved, op.restore.tokens)
        else:
            raise ValueError(f"unknown cache operation {kind}")


def _touched(op: CacheOp) -> Iterator[int]:
    """The caches that an operation reads or changes."""
    yield op.cache
    yield from op.merge.sources
    yield from (op.extend.other, op.extract.source, op.copy.source)
    yield from (op.quantize.source, op.snapshot.source, op.restore.snapshot)


def _answer(caches: Caches | None, live: int) -> CacheAnswer:
    if caches is None:
        return CacheAnswer(live=live)
    return CacheAnswer(
        trimmable=all(cache.is_trimmable() for cache in caches),
        size=_size(caches),
        nbytes=sum(cache.nbytes for cache in caches),
        empty=all(cache.empty() for cache in caches),
        entries=len(caches),
        live=live,
    )


def _size(caches: Caches) -> int:
    """Tokens in it, as far as its members count them: state-space caches don't."""
    return max((_tokens(cache) for cache in caches), default=0)


def _tokens(cache: Any) -> int:
    # mlx-lm's quantized caches say 0.
    return int(cache.offset if isinstance(cache, QuantizedKVCache) else cache.size())


def _prepare_arguments(prepare: CacheOp.Prepare) -> dict[str, list[int]]:
    named = {
        "left_padding": list(prepare.left_padding),
        "lengths": list(prepare.lengths),
        "right_padding": list(prepare.right_padding),
    }
    return {name: values for name, values in named.items() if values}


def _stored(store: CacheOp.Store) -> Any:
    """A cache made from a saved state. Only mlx-lm's own cache classes are made."""
    kind: Any = getattr(mlx_cache, store.kind, None)
    known = isinstance(kind, type) and issubclass(kind, mlx_cache._BaseCache)
    if not known:
        raise ValueError(f"{store.kind!r} is no cache class of this mlx-lm")
    return kind.from_state(decode_tree(store.state))
