"""A stage of ggml: caches by handle, and the two verbs of an engine, apply and forward."""

import time
from dataclasses import dataclass

import numpy as np

from node.ggml.embedding import Embedding
from node.ggml.layers import Layers
from node.ggml.library import Floats
from node.ggml.rows import Cache, Row, Sequences
from node.ggml.wire import decode, encode
from node.mlx.tensors import leaf_bytes
from node.ring.session import Session
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, Frame, StagePart, StageReport

# What a saved cache is called: mlx-lm has to know the name to load it. Its state is a list of
# arrays and two values that may be None.
STATE_KIND = "ArraysCache"


@dataclass
class _Held:
    """A chunk whose logits nobody may ever want: computed again if somebody does."""

    before: Cache
    hidden: Floats


class GgmlStage:
    """Serves frames over some layers of a GGUF. All calls come from one thread.

    `embedding` is that of stage 0, which is given token ids.
    """

    def __init__(self, layers: Layers, embedding: Embedding | None = None) -> None:
        self._layers = layers
        self._embedding = embedding
        self._sequences = Sequences(layers)
        self.computed_tokens = 0

    def serve(self, session: Session, frame: Frame, arrived: float) -> None:
        """Does this stage's part of a frame; see StageEngine."""
        started = time.perf_counter()
        report = frame.reports.add(
            stage=session.stage,
            arrived_s=arrived,
            queue_s=started - arrived,
            received_bytes=leaf_bytes(frame.hidden),
        )
        for index, part in enumerate(frame.parts):
            if part.stage == session.stage:
                for op in part.ops:
                    self._apply(session, op, report)
                if part.cache:
                    self._forward(session, part, frame, report)
                del frame.parts[index]
                break
        if session.last:
            for dropped in frame.dropped:
                self._drop(session, dropped)
            if frame.claim:
                self._claim(session, frame)
        report.compute_s = time.perf_counter() - started

    def look_ahead(self, session: Session) -> None:
        """Nothing can be prepared: llama.cpp computes at once."""

    def end(self, session: Session) -> None:
        """Frees all that the session has."""
        for number in list(session.held):
            self._drop(session, number)
        for cache in session.caches.values():
            cache.free()
        session.caches.clear()

    def _forward(
        self, session: Session, part: StagePart, frame: Frame, report: StageReport
    ) -> None:
        cache: Cache = session.caches[part.cache]
        given, dtype = decode(frame.hidden)
        hidden = given if self._embedding is None else self._embedding.rows(given)
        frame.ClearField("hidden")
        finishes = bool(self._layers.sizes.vocabulary)
        self.computed_tokens += hidden.shape[0] * hidden.shape[1]
        rows = cache.batch(len(hidden))
        keeps = session.last and frame.hold
        if finishes and keeps:
            session.held[frame.id] = _Held(cache.copy(), hidden)
            rows = cache.batch(len(hidden))
            self._compute(rows, hidden, wanted=False)
        else:
            result = self._compute(rows, hidden, wanted=True)
            if keeps:
                session.held[frame.id] = result
            else:
                # Hidden states go out as they came: the next stage may be of the other engine.
                known = dtype in ("float16", "bfloat16") and not finishes
                encode(result, frame.hidden, dtype if known else "float32")
        report.trimmable = not self._layers.recurrent
        report.size = cache.size

    def _compute(self, rows: list[Row], hidden: Floats, wanted: bool) -> Floats:
        """Through the layers: (batch, columns, hidden) to hidden states or logits.

        Of columns that are padding the result is zero. llama.cpp gives rows of unequal length
        to recurrent layers in an order of its own, so those are computed one after the other.
        """
        batch, columns = hidden.shape[:2]
        starts = [row.length for row in rows]
        taken = [row.take(columns) for row in rows]
        width = self._layers.sizes.vocabulary or self._layers.sizes.hidden
        result = np.zeros((batch, columns if wanted else 0, width), np.float32)
        alone = self._layers.recurrent and columns > 1
        groups = [[index] for index in range(batch)] if alone else [list(range(batch))]
        for group in groups:
            parts = [hidden[i, taken[i][0] : taken[i][1]] for i in group]
            counts = [len(part) for part in parts]
            if not sum(counts):
                continue
            positions = [
                starts[i] + n for i, c in zip(group, counts, strict=True) for n in range(c)
            ]
            sequences = [
                rows[i].sequence for i, c in zip(group, counts, strict=True) for _ in range(c)
            ]
            computed = self._layers.forward(
                np.concatenate(parts) if len(parts) > 1 else parts[0], positions, sequences, wanted
            )
            at = 0
            for i, count in zip(group, counts, strict=True):
                rows[i].length += count
                if wanted:
                    result[i, taken[i][0] : taken[i][1]] = computed[at : at + count]
                at += count
        return result

    def _claim(self, session: Session, frame: Frame) -> None:
        held = session.held.pop(frame.claim)
        if isinstance(held, _Held):
            rows = held.before.batch(len(held.hidden))
            encode(self._compute(rows, held.hidden, wanted=True), frame.hidden)
            held.before.free()
        else:
            encode(held, frame.hidden)

    def _drop(self, session: Session, number: int) -> None:
        held = session.held.pop(number, None)
        if isinstance(held, _Held):
            held.before.free()

    def _apply(self, session: Session, op: CacheOp, report: StageReport) -> None:
        caches: dict[int, Cache] = session.caches
        kind = op.WhichOneof("op")
        if kind == "make":
            caches[op.cache] = Cache(self._sequences)
        elif kind == "merge":
            merged = [caches[source] for source in op.merge.sources]
            caches[op.cache] = Cache.merge(self._sequences, merged)
        elif kind == "filter":
            caches[op.cache].filter(list(op.filter.rows))
        elif kind == "extend":
            caches[op.cache].extend(caches[op.extend.other])
        elif kind == "extract":
            caches[op.cache] = caches[op.extract.source].extract(op.extract.row)
        elif kind == "prepare":
            asked = op.prepare
            caches[op.cache].prepare(asked.left_padding, asked.lengths, asked.right_padding)
        elif kind == "finalize":
            caches[op.cache].finalize()
        elif kind == "trim":
            caches[op.cache].trim(op.trim.tokens)
        elif kind == "copy":
            caches[op.cache] = caches[op.copy.source].copy()
        elif kind == "free":
            if (freed := caches.pop(op.cache, None)) is not None:
                freed.free()
        elif kind == "query":
            report.answer.CopyFrom(self._answer(caches.get(op.cache), len(caches)))
        elif kind == "fetch":
            report.state.kind = STATE_KIND
            self._save(caches[op.cache], report)
        elif kind == "store":
            caches[op.cache].free()
            caches[op.cache] = self._restored(op.store)
        elif kind == "snapshot":
            caches[op.cache] = caches[op.snapshot.source].copy()
        elif kind == "restore":
            caches[op.cache].free()
            caches[op.cache] = caches.pop(op.restore.snapshot)
        else:
            raise ValueError(f"ggml has no cache operation {kind}")

    def _answer(self, cache: Cache | None, live: int) -> CacheAnswer:
        if cache is None:
            return CacheAnswer(live=live)
        return CacheAnswer(
            trimmable=not self._layers.recurrent,
            size=cache.size,
            nbytes=sum(self._nbytes(row) for row in cache.rows),
            empty=not cache.size,
            entries=1,
            live=live,
        )

    def _nbytes(self, row: Row) -> int:
        """Bytes of a row, and at least so many that not too many rows are kept for reuse."""
        if not row.length:
            return 0
        size = self._layers.state_size(row.sequence)
        # Of the sequences there may be, half are for answers in the making.
        least = 2 * self._layers.sizes.cells // self._layers.sequences
        return size * max(row.length, least) // row.length

    def _save(self, cache: Cache, report: StageReport) -> None:
        leaves = report.state.state
        for row in cache.rows:
            state = np.frombuffer(self._layers.state(row.sequence), np.uint8)
            for array in (np.array([row.length], np.uint32), state):
                leaf = leaves.add(key=f"0.{len(leaves)}")
                leaf.tensor.dtype = array.dtype.name
                leaf.tensor.shape.extend(array.shape)
                leaf.tensor.data = array.tobytes()
        leaves.add(key="1", json="null")
        leaves.add(key="2", json="null")

    def _restored(self, store: CacheOp.Store) -> Cache:
        leaves = [decode([leaf])[0] for leaf in store.state if leaf.HasField("tensor")]
        rows = []
        for length, state in zip(leaves[::2], leaves[1::2], strict=True):
            row = self._sequences.new()
            row.length = int(length[0])
            if row.length:
                self._layers.restore(row.sequence, state.tobytes())
            rows.append(row)
        return Cache(self._sequences, rows)
