"""A stage of ggml: caches as sequences of llama.cpp, and the forward of its layers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from node.ggml.embedding import Lookup
from node.ggml.layers import Layers
from node.ggml.library import Floats, Inputs
from node.ggml.memory.rows import Cache, Row, Sequences
from node.ggml.memory.saved_state import Bytes, StateFormat
from node.ggml.wire import Array, decode, encode
from node.prefixes.saved import SavedArray, SavedEntry
from node.ring.bounds import FrameError
from node.ring.cache_engine import Extent
from node.ring.frame_server import FrameServer
from node.ring.leaves import FLOATS
from unicluster.errors import UniclusterError
from unicluster.v1.stage_pb2 import CacheAnswer, CacheOp, CacheState

if TYPE_CHECKING:
    from node.ring.cache_engine import Leaves

log = logging.getLogger(__name__)

# Class name of a saved cache: mlx-lm has to know it to load one. Its state is a list of arrays
# and two values that may be None.
STATE_KIND = "ArraysCache"
# Names of its arrays in a file: the second one's with a number, for the state is in pieces there.
LENGTH, STATE = "length", "state"
TOKEN_TYPES = frozenset({"uint32", "int32"})


@dataclass
class DeferredResult:
    """Deferred result of a prefill chunk on the last stage, which may never be claimed.

    result: hidden states of a stage without lm_head. before, hidden: else the cache as it was
    and the chunk's input, of which logits are computed if they are claimed.
    """

    result: Floats | None = None
    before: Cache | None = None
    hidden: Inputs | None = None


class GgmlStage(FrameServer[Cache, DeferredResult]):
    """Serves frames over some layers of a GGUF. All calls come from one thread.

    `embedding`: that of stage 0, whose input is token ids. `file` is held as long as the stage is.
    """

    engine: ClassVar[str] = "ggml"

    def __init__(
        self, layers: Layers, embedding: Lookup | None = None, file: object = None
    ) -> None:
        self._layers = layers
        self._file = file
        self._embedding = embedding
        self._sequences = Sequences(layers)
        self._has_lm_head = bool(layers.sizes.vocabulary)
        self._format: StateFormat | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens of the model, as far as this stage knows: of its embedding, or of its logits."""
        return self._embedding.count if self._embedding else self._layers.sizes.vocabulary

    @property
    def threads(self) -> int:
        """Threads that compute a token; 0: not on the CPU."""
        return self._layers.decoding_threads

    @property
    def most_tokens(self) -> int:
        return self._layers.sizes.cells

    def extent(self, hidden: "Leaves") -> tuple[int, int]:
        if len(hidden) != 1 or not hidden[0].HasField("tensor"):
            raise FrameError("the stage before outputs more than a hidden state")
        dtype, shape = hidden[0].tensor.dtype, list(hidden[0].tensor.shape)
        wanted = TOKEN_TYPES if self._embedding else FLOATS
        if dtype not in wanted:
            raise FrameError(f"an input of {dtype}, which ggml can't use here")
        like = [] if self._embedding else [self._layers.sizes.hidden]
        if shape[2:] != like or len(shape) != 2 + len(like) or 0 in shape:
            raise FrameError(f"an input of shape {shape}, not {['batch', 'tokens', *like]}")
        return shape[0], shape[1]

    def forward(self, cache: Cache, hidden: "Leaves", *, prefill: bool) -> bool:
        inputs, dtype = self._taken(hidden)
        result = self._compute(cache.batch(len(inputs)), inputs, wanted=True)
        # Hidden states go out as they came: the next stage may be of the other engine.
        same = dtype in ("float16", "bfloat16") and not self._has_lm_head
        encode(result, hidden, dtype if same else "float32")
        return False  # llama.cpp computes at once: nothing can be prepared

    def hold(self, cache: Cache, hidden: "Leaves") -> DeferredResult:
        inputs, _ = self._taken(hidden)
        rows = cache.batch(len(inputs))
        if not self._has_lm_head:
            return DeferredResult(result=self._compute(rows, inputs, wanted=True))
        deferred = DeferredResult(before=cache.copy(), hidden=inputs)
        try:
            self._compute(cache.batch(len(inputs)), inputs, wanted=False)
        except BaseException:
            self.drop(deferred)
            raise
        return deferred

    def claim(self, deferred: DeferredResult, hidden: "Leaves") -> None:
        result = deferred.result
        if deferred.before is not None and deferred.hidden is not None:
            try:
                rows = deferred.before.batch(len(deferred.hidden))
                result = self._compute(rows, deferred.hidden, wanted=True)
            finally:
                deferred.before.free()
        if result is not None:
            encode(result, hidden)

    def drop(self, deferred: DeferredResult) -> None:
        if deferred.before is not None:
            deferred.before.free()

    def close(self) -> None:
        """Frees everything. It is of no use afterwards."""
        self._layers.close()

    def make(self) -> Cache:
        return Cache(self._sequences)

    def merge(self, sources: Sequence[Cache]) -> Cache:
        return Cache.merge(self._sequences, sources)

    def filter(self, cache: Cache, rows: Sequence[int]) -> None:
        cache.filter(rows)

    def extend(self, cache: Cache, other: Cache) -> None:
        cache.extend(other)

    def extract(self, cache: Cache, row: int) -> Cache:
        return cache.extract(row)

    def prepare(self, cache: Cache, padding: CacheOp.Prepare) -> None:
        cache.prepare(padding.left_padding, padding.lengths, padding.right_padding)

    def finalize(self, cache: Cache) -> None:
        cache.finalize()

    def trim(self, cache: Cache, tokens: int) -> None:
        cache.trim(tokens)

    def copy(self, cache: Cache) -> Cache:
        return cache.copy()

    def free(self, cache: Cache) -> None:
        cache.free()

    def query(self, cache: Cache) -> CacheAnswer:
        return CacheAnswer(
            trimmable=self.trimmable(cache),
            size=cache.size,
            nbytes=sum(self._nbytes(row) for row in cache.made),
            empty=not cache.size,
            entries=1,
        )

    def fetch(self, cache: Cache, entry: int, into: CacheState) -> None:
        into.kind = STATE_KIND
        for row in cache.rows:
            state = self._sequences.state(row)
            for array in (np.array([row.length], np.uint32), state):
                leaf = into.state.add(key=f"0.{len(into.state)}")
                leaf.tensor.dtype = array.dtype.name
                leaf.tensor.shape.extend(array.shape)
                leaf.tensor.data = array.tobytes()
        into.state.add(key="1", json="null")
        into.state.add(key="2", json="null")

    def store(self, cache: Cache, entry: int, kind: str, state: "Leaves") -> Extent:
        if kind != STATE_KIND:
            raise FrameError(f"a saved {kind[:40]!r} for a cache of ggml")
        tensors = [leaf.tensor for leaf in state if leaf.HasField("tensor")]
        if len(tensors) % 2 or {leaf.json for leaf in state if not leaf.HasField("tensor")} - {
            "null"
        }:
            raise FrameError("a saved state of other parts than ggml's")
        with self._sequences.rows(len(tensors) // 2) as rows:
            for row, length, saved in zip(rows, tensors[::2], tensors[1::2], strict=True):
                if (length.dtype, list(length.shape), saved.dtype) != ("uint32", [1], "uint8"):
                    raise FrameError(
                        f"a saved length of {length.dtype}, with a state of {saved.dtype}"
                    )
                self._load(row, int.from_bytes(length.data, "little"), saved.data)
        loaded = Cache(self._sequences, rows)
        cache.take(loaded)
        return Extent(len(rows), cache.size)

    def save(self, cache: Cache) -> list[SavedEntry]:
        (row,) = cache.rows
        length = SavedArray("uint32", np.array([row.length], np.uint32))
        state = self._sequences.state(row)
        pieces: list[tuple[Bytes, int | None]] = [(state, None)]
        try:
            if row.length:
                pieces = self._known_format().pieces(state, row.length)
        except UniclusterError as error:  # of another order, or no room to see its format
            log.info("a prompt cache goes to disk whole: %s", error)
        leaves = [SavedArray("uint8", piece, axis) for piece, axis in pieces]
        named = ((f"{STATE}.{index}", leaf) for index, leaf in enumerate(leaves))
        return [SavedEntry(STATE_KIND, ((LENGTH, length), *named))]

    def revive(self, entries: Sequence[SavedEntry]) -> tuple[Cache, Extent]:
        (entry,) = entries if len(entries) == 1 else (None,)
        leaves = [leaf for _, leaf in entry.leaves] if entry is not None else []
        arrays = [leaf.values for leaf in leaves if isinstance(leaf, SavedArray)]
        if len(arrays) < 2 or len(arrays) < len(leaves) or arrays[0].shape != (1,):
            raise FrameError("a saved state of other parts than ggml's")
        state = b"".join(array.tobytes() for array in arrays[1:])
        with self._sequences.rows(1) as rows:
            self._load(rows[0], int(arrays[0][0]), state)
        cache = Cache(self._sequences, rows)
        return cache, Extent(1, cache.size)

    def _load(self, row: Row, tokens: int, state: bytes) -> None:
        if tokens > self.most_tokens:
            raise FrameError(f"{tokens} saved tokens, of {self.most_tokens} at most")
        if tokens:
            self._state_format(row).check(state, tokens)
            (number,) = self._sequences.bring([row])
            self._layers.restore(number, state)
            row.length = tokens
            restored = self._layers.last_position(number) + 1
            if restored != tokens or self._layers.state_size(number) != len(state):
                raise FrameError(f"a saved state of {restored} tokens, not of {tokens}")

    def _known_format(self) -> StateFormat:
        """The format of saved states. Raises StageError where there is no room for an example."""
        if self._format is not None:
            return self._format
        row = self._sequences.new()
        try:
            return self._state_format(row)
        finally:
            self._sequences.release(row)

    def _state_format(self, row: Row) -> StateFormat:
        """The format of saved states, by an example that is computed in an empty row."""
        if self._format is None:
            (number,) = self._sequences.bring([row])
            self._layers.forward(self._layers.blank(1), [0], [number], True)
            example = self._layers.state(number).tobytes()
            self._layers.trim(number, 0)
            self._format = StateFormat.of(example)
        return self._format

    def snapshot(self, cache: Cache, *, single: bool = False) -> Cache:
        return cache.copy()

    def restore(
        self, cache: Cache, snapshot: Cache, tokens: int, later: Sequence[Cache] = ()
    ) -> None:
        for each in later:
            each.free()
        cache.take(snapshot)

    def entries(self, cache: Cache) -> int:
        return 1

    def trimmable(self, cache: Cache, tokens: int = 0) -> bool:
        return not self._layers.recurrent and cache.can_trim(tokens or cache.size - 1)

    def size(self, cache: Cache) -> int:
        return cache.size

    def _taken(self, hidden: "Leaves") -> tuple[Inputs, str]:
        """The frame's hidden states, removed from it, and their dtype on the wire."""
        received, dtype = decode(hidden)
        del hidden[:]
        if self._embedding is None:
            # All sequences share a KV cache, and attention multiplies even what it masks.
            if not np.isfinite(received).all():
                raise FrameError("a hidden state of infinite numbers, or of none")
            return received, dtype
        most = self._embedding.count - 1
        if not 0 <= received.min() <= received.max() <= most:
            raise FrameError(f"token ids {received.min()}-{received.max()}, not within 0-{most}")
        return self._embedding.rows(received), dtype

    def _compute(self, rows: list[Row], hidden: Inputs, wanted: bool) -> Floats:
        """Runs the layers: (batch, columns, hidden), or token ids, to hidden states or logits.

        Of columns that are padding the result is zero. llama.cpp gives rows of unequal length
        to recurrent layers in an order of its own, so those are computed one after the other.
        """
        batch, columns = hidden.shape[:2]
        starts = [row.length for row in rows]
        self._check_room(rows, columns)
        numbers = self._sequences.bring(rows)
        taken = [row.take(columns) for row in rows]
        width = self._layers.sizes.vocabulary or self._layers.sizes.hidden
        result = np.zeros((batch, columns if wanted else 0, width), np.float32)
        alone = self._layers.recurrent and columns > 1
        groups = [[index] for index in range(batch)] if alone else [list(range(batch))]
        for group in groups:
            parts: list[Array] = [hidden[i, taken[i][0] : taken[i][1]] for i in group]
            counts = [len(part) for part in parts]
            if not sum(counts):
                continue
            positions = [
                starts[i] + n for i, c in zip(group, counts, strict=True) for n in range(c)
            ]
            sequences = [numbers[i] for i, c in zip(group, counts, strict=True) for _ in range(c)]
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

    def _check_room(self, rows: list[Row], columns: int) -> None:
        """Raises StageError for more tokens than the KV cache has cells, before any is computed."""
        most = self._layers.sizes.cells
        if any(row.length + row.count(columns) > most for row in rows):
            raise self._layers.full()

    def _nbytes(self, row: Row) -> int:
        """Bytes of a row, rounded up so that not too many rows are cached for reuse."""
        if not row.length:
            return 0
        size, fixed = self._sequences.nbytes(row)
        # Of the sequences there may be, a third is for answers in the making.
        least = 3 * self._layers.sizes.cells // (2 * self._layers.sequences)
        return 3 * fixed // 2 + (size - fixed) * max(row.length, least) // row.length
