"""Some layers of a GGUF in llama.cpp: hidden states in, hidden states or logits out."""

import ctypes
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from node.ggml.devices import OnDevices
from node.ggml.library import (
    F16,
    F32,
    MULTIPLE_POSITIONS,
    Buffers,
    Complaint,
    Floats,
    Inputs,
    amx_is_broken,
    computes_on_cpu,
    llama,
    load_error,
)
from node.ggml.memory.places import State
from node.ggml.repeated import can_repeat
from node.ggml.tap import Tap
from node.ggml.threads import Threads
from unicluster.errors import StageError

log = logging.getLogger("unicluster.llama")

# Tokens that llama.cpp computes at once.
BATCH = 512
# Rows of logits at once: enough for decoding and for checking a speculation.
OUTPUTS = 64
# On a CPU attention is faster when its scores are a matrix (`bench.ggml`), which takes no more room
# than the planner keeps for the runtime: so steps are of few tokens, and not for a long context.
CPU_STEP = 64
MOST_SCORE_BYTES = 128 * 2**20
# Tokens of a KV cache in which one is computed for a trial.
SHORT = 256
# Sequences that llama.cpp can tell apart at most; with each step it looks at all pairs of those
# that it is to tell apart.
MOST_SEQUENCES = 256


@dataclass(frozen=True)
class Sizes:
    """cells: tokens that all sequences together may have. threads: 0 for llama.cpp's choice.

    vocabulary: 0 for a stage that outputs hidden states. sequences: how many there may be at
    once. states: as many, for a model with recurrent layers, each of which takes memory. tokens:
    the input are token ids; else hidden states of `inputs` numbers, which are put into the tensor
    `entry`, if it has a name. exit: the name of a layer's output, with its number. exact:
    attention in float32 throughout. heads: of attention in a layer.
    devices: names of llama.cpp's, each with the number of layers on it, in order; empty: those
    that llama.cpp takes by itself. adaptive: `threads` are the most, fewer if that is faster.
    host_bytes: of sequences that wait on the host, at most. simulated: nothing is loaded, but for
    recurrent states; large_steps: on a CPU too, steps are as large as those on a GPU.
    """

    layers: int
    hidden: int
    cells: int
    vocabulary: int = 0
    sequences: int = 32
    states: int = 4
    threads: int = 0
    inputs: int = 0
    tokens: bool = False
    entry: str = ""
    exit: str = "l_out-%d"
    exact: bool = False
    heads: int = 0
    devices: tuple[tuple[str, int], ...] = ()
    adaptive: bool = False
    host_bytes: int = 1 << 62
    simulated: bool = False
    large_steps: bool = False

    @property
    def score_bytes(self) -> int:
        """Bytes of the attention scores of CPU_STEP tokens over all cells, in float32."""
        return 4 * self.heads * CPU_STEP * self.cells


class Layers:
    """A cut file loaded. For one thread. workspace_bytes: of the buffers that it computes in.

    recurrent: layers have states, which can't be trimmed. window: tokens of the sliding window of
    layers that can be; 0: none.

    Raises StageError when llama.cpp can't load it, or has no such device.
    """

    def __init__(self, file: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self._lib = lib = llama()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = sizes.layers + 1
        params.use_extra_bufts = not amx_is_broken()
        params.no_alloc = sizes.simulated
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # or the file's pages would count twice
        self._devices = OnDevices(sizes.devices, sizes.layers)  # alive as long as `params`
        self._devices.apply(params)
        with Complaint() as complaint:
            self._model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise load_error(file, complaint)
        self.recurrent = bool(
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )
        # Cells that a window has passed are given to others if they are of one sequence alone, and
        # would be missed after a trim: so each sequence has a twin, of the same cells.
        self.window = 0 if self.recurrent else max(lib.llama_model_n_swa(self._model), 0)
        self._twins = 2 if self.window else 1
        rope = int(lib.llama_model_rope_type(self._model))
        self._position_copies = 4 if rope in MULTIPLE_POSITIONS else 1
        leave = "" if sizes.vocabulary else sizes.exit.replace("%d", str(sizes.layers - 1))
        self._widths = sizes.inputs or sizes.hidden, sizes.hidden
        self._tap = Tap(sizes.entry, leave, self._widths) if sizes.entry or leave else None
        self._leave = leave
        with Complaint() as complaint, Buffers() as buffers:
            self._context = lib.llama_init_from_model(self._model, self._parameters())
        self.workspace_bytes = buffers.nbytes
        if not self._context:
            lib.llama_model_free(self._model)
            raise StageError(
                f"llama.cpp has no room for the KV cache of {sizes.cells} tokens{complaint.reason}"
            )
        self._memory = lib.llama_get_memory(self._context)
        self._threads = sizes.threads
        if self._tap is not None and self._on_cpu and can_repeat():
            self._tap.repeat(lambda: int(lib.llama_perf_context(self._context).n_reused))
            self._tap.set_threads(int(lib.llama_n_threads(self._context)))
        self.threads: Threads | None = None
        # The result does not depend on their number, but with flash attention.
        if sizes.adaptive and self._on_cpu and self._plain_attention:
            self.threads = Threads(sizes.threads)
        self._positions = np.zeros(BATCH * self._position_copies, np.int32)
        self._sequences = np.zeros((BATCH, self._twins), np.int32)
        self._tokens = np.zeros(BATCH, np.int32)
        self._counts = np.full(BATCH, self._twins, np.int32)
        self._wanted = np.zeros(BATCH, np.int8)
        steps = np.arange(BATCH, dtype=np.uint64) * np.uint64(4 * self._twins)
        self._pointers = np.uint64(self._sequences.ctypes.data) + steps
        self._batch = lib.llama_batch()
        self._batch.pos = _pointer(self._positions, ctypes.c_int32)
        self._batch.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        self._batch.seq_id = ctypes.cast(
            self._pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        )
        if sizes.entry or sizes.tokens:
            self._batch.token = _pointer(self._tokens, ctypes.c_int32)
            self._position_copies = 1
        self._batch.logits = _pointer(self._wanted, ctypes.c_int8)

    @property
    def sequences(self) -> int:
        """Number of sequences at once, at most."""
        wanted = self.sizes.states if self.recurrent else self.sizes.sequences
        return min(wanted, MOST_SEQUENCES // self._twins)

    @property
    def host_bytes(self) -> int:
        """Bytes of sequences that wait on the host, at most."""
        return self.sizes.host_bytes

    def blank(self, tokens: int) -> Inputs:
        """An input of zeros, for something that any would do for."""
        if self.sizes.tokens:
            return np.zeros(tokens, np.int32)
        return np.zeros((tokens, self.sizes.inputs or self.sizes.hidden), np.float32)

    def forward(
        self, hidden: Inputs, positions: Sequence[int], sequences: Sequence[int], wanted: bool
    ) -> Floats:
        """Computes hidden states (tokens, hidden), or token ids, row by row, at their positions.

        A sequence's tokens follow one another. Returns (tokens, hidden), or logits (tokens,
        vocabulary) of a stage with the lm_head; an empty array, if not `wanted`.
        Raises StageError when the KV cache is full.
        """
        width = self.sizes.vocabulary or self.sizes.hidden
        step = OUTPUTS if self.sizes.vocabulary and wanted else BATCH
        result = np.empty((len(hidden) if wanted else 0, width), np.float32)
        for start in range(0, len(hidden), step):
            piece = slice(start, min(start + step, len(hidden)))
            self._compute(hidden[piece], positions[piece], sequences[piece], wanted, result[piece])
        return result

    def trace(self, watcher: Callable[[int], None]) -> None:
        """Computes one token, apart from all sequences; see Tap for the watcher.

        Raises StageError when llama.cpp can't.
        """
        context, tap = self._context, self._tap
        self._tap = Tap(self.sizes.entry, self._leave, self._widths)
        self._tap.watcher = watcher
        params = self._parameters()
        params.n_ctx = SHORT
        params.n_seq_max = params.n_outputs_max = self._numbers(0)[-1] + 1
        params.n_batch = params.n_ubatch = 1
        params.cb_eval = self._tap.callback
        with Complaint() as complaint:
            self._context = self._lib.llama_init_from_model(self._model, params)
        try:
            if not self._context:
                raise StageError(f"llama.cpp can't compute these layers{complaint.reason}")
            self.forward(self.blank(1), [0], [0], True)
        finally:
            if self._context:
                self._lib.llama_free(self._context)
            self._context, self._tap = context, tap

    def try_threads(self, seconds: float) -> None:
        """Finds the fastest number of threads by steps over zeros, for so many seconds at most.

        Nothing where their number is stated, or can't matter. All sequences must be empty.
        """
        if self.threads is None:
            return
        ends = time.monotonic() + seconds
        for position in range(self.sizes.cells):
            if self.threads.settled or time.monotonic() >= ends:
                break
            self.forward(self.blank(1), [position], [0], True)
        self.trim(0, 0)

    def copy(self, source: int, to: int, tokens: int) -> None:
        """Gives the sequence `to`, which is empty, the first `tokens` of another; moves nothing.

        Raises StageError if the other has no more than a window of them.
        """
        self._check_shortest(source, tokens)
        end = -1 if self.recurrent else tokens
        for each in self._numbers(to):
            self._lib.llama_memory_seq_cp(self._memory, source, each, 0 if end >= 0 else -1, end)

    def trim(self, sequence: int, tokens: int) -> None:
        """Trims a sequence to its first `tokens`. Raises StageError if it can't be done."""
        self._check_shortest(sequence, tokens)
        for each in self._numbers(sequence):
            if not self._lib.llama_memory_seq_rm(self._memory, each, tokens, -1):
                raise StageError("a recurrent layer's state can't be trimmed by some tokens")

    def shortest(self, sequence: int, *, saved: bool = False) -> int:
        """Tokens that a sequence has at least after a trim, but for one to none.

        llama.cpp saves no more of a layer with a window than the window; saved: as it is then.
        """
        if not self.window:
            return 0
        first = int(self._lib.llama_memory_seq_pos_min(self._memory, sequence))
        if saved:
            first = max(first, self.last_position(sequence) + 1 - self.window)
        return first + self.window - 1 if first > 0 else 0

    def state_size(self, sequence: int) -> int:
        """Bytes of a sequence's saved state."""
        return int(self._lib.llama_state_seq_get_size(self._context, sequence))

    def fixed_size(self, sequence: int) -> int:
        """Bytes of the parts of a sequence's saved state that don't grow with its tokens."""
        if not self.recurrent:
            return 0
        partial = self._lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        return int(self._lib.llama_state_seq_get_size_ext(self._context, sequence, partial))

    def state(self, sequence: int) -> State:
        """Saved state of a sequence, its KV cells and recurrent states, in uint8."""
        data = np.empty(self.state_size(sequence), np.uint8)
        pointer = _pointer(data, ctypes.c_uint8)
        written = self._lib.llama_state_seq_get_data(self._context, pointer, data.size, sequence)
        return data[:written]

    def restore(self, sequence: int, state: State | bytes) -> None:
        """Raises StageError if it is the state of another model, or there is no room for it."""
        data = np.frombuffer(state, np.uint8)
        pointer = _pointer(data, ctypes.c_uint8)
        if not self._lib.llama_state_seq_set_data(self._context, pointer, data.size, sequence):
            raise StageError("this saved cache does not fit the stage")
        for twin in self._numbers(sequence)[1:]:
            self._lib.llama_memory_seq_cp(self._memory, sequence, twin, -1, -1)

    def last_position(self, sequence: int) -> int:
        """Position of the last token of a sequence; -1 of an empty one."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, sequence))

    def full(self) -> StageError:
        """The error for more tokens than there are cells."""
        return StageError(
            f"the KV cache of {self.sizes.cells} tokens is full: serve with a larger "
            "--context, or more --users"
        )

    @property
    def weight_bytes(self) -> int:
        return int(self._lib.llama_model_size(self._model))

    @property
    def decoding_threads(self) -> int:
        """Threads that compute a token; 0: not on the CPU."""
        if not self._on_cpu:
            return 0
        return self.threads.latest if self.threads is not None else self.sizes.threads

    def close(self) -> None:
        """Frees everything. It is of no use afterwards."""
        if self._tap is not None:
            self._tap.close()
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _compute(
        self,
        hidden: Inputs,
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: bool,
        into: Floats,
    ) -> None:
        count = len(hidden)
        rows: Floats = np.empty((0, 0), np.float32)
        if self.sizes.tokens:
            self._tokens[:count] = hidden
        else:
            rows = np.ascontiguousarray(hidden, np.float32)
        for copy in range(min(self._position_copies, 3)):
            self._positions[copy * count : (copy + 1) * count] = positions
        if self._position_copies > 3:
            self._positions[3 * count : 4 * count] = 0
        self._sequences[:count] = [self._numbers(each) for each in sequences]
        # For a hidden state as output llama.cpp must compute the last layer for all tokens.
        self._wanted[:count] = wanted or not self.sizes.vocabulary
        batch = self._batch
        batch.n_tokens = count
        if not self.sizes.entry and not self.sizes.tokens:
            batch.embd = _pointer(rows, ctypes.c_float)
        if self._tap is not None:
            self._tap.open(rows, into, alone=count <= CPU_STEP)
        status = self._decode(count)
        if status == 1:
            raise self.full()
        if status:
            raise StageError(f"llama.cpp failed to compute {count} tokens (status {status})")
        if self._tap is not None:
            self._tap.check()
        if wanted and self.sizes.vocabulary:
            logits = self._lib.llama_get_logits(self._context)
            into[:] = np.ctypeslib.as_array(logits, into.shape)

    def _decode(self, count: int) -> int:
        """llama.cpp's status of computing the batch of `count` tokens."""
        if self.threads is None:
            return int(self._lib.llama_decode(self._context, self._batch))
        with self.threads.step(count) as threads:
            if threads != self._threads:
                self._lib.llama_set_n_threads(self._context, threads, threads)
                if self._tap is not None:
                    self._tap.set_threads(threads)
                self._threads = threads
            return int(self._lib.llama_decode(self._context, self._batch))

    def _check_shortest(self, sequence: int, tokens: int) -> None:
        if 0 < tokens < self.shortest(sequence):
            raise StageError("a saved cache with windows can't be trimmed by so many tokens")

    def _numbers(self, sequence: int) -> Sequence[int]:
        """Numbers in llama.cpp of a sequence: its own, and its twin's."""
        return range(sequence, self.sequences * self._twins, self.sequences)

    @functools.cached_property
    def _on_cpu(self) -> bool:
        return computes_on_cpu([name for name, _ in self.sizes.devices])

    @property
    def _small_steps(self) -> bool:
        return self._on_cpu and not self.sizes.large_steps

    @property
    def _plain_attention(self) -> bool:
        """Whether attention is computed without flash attention, which sums up in float16."""
        small = self._small_steps and self.sizes.score_bytes <= MOST_SCORE_BYTES
        return self.sizes.exact or small

    def _parameters(self) -> Any:
        lib, sizes = self._lib, self.sizes
        params = lib.llama_context_default_params()
        params.n_ctx = sizes.cells
        params.n_batch = params.n_ubatch = BATCH
        if self._small_steps:
            params.n_ubatch = CPU_STEP
        params.n_seq_max = self.sequences * self._twins
        params.n_outputs_max = max(OUTPUTS, params.n_seq_max) if sizes.vocabulary else BATCH
        params.kv_unified = True
        params.swa_full = True  # or nothing could be trimmed once the window is full
        params.no_perf = True
        params.type_k = params.type_v = F32 if sizes.exact else F16
        if self._plain_attention:
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if sizes.threads:
            params.n_threads = params.n_threads_batch = sizes.threads
        if self._tap is not None:
            params.cb_eval = self._tap.callback
        return params


def _pointer(array: "np.ndarray[Any, Any]", kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
