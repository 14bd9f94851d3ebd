"""Layouts of models, stages, and plans, with the predicted speeds of each.

A stage's seconds a token, until they are measured: the bytes it reads for one token (active
weights, and one user's KV cache at the full context) at BANDWIDTH_SHARE of its machine's memory
bandwidth, and LAYER_S a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from coordinator.planning import devices
from coordinator.planning.engines import DEFAULT, ENGINES, QUANTIZED
from coordinator.planning.machine import Machine
from unicluster.errors import InputError
from unicluster.v1 import node_pb2

Objective = Literal["latency", "throughput"]

# Decoding reads weights at about this part of what the memory could give: a usual figure for
# quantized matrix-vector kernels on all the machines here.
BANDWIDTH_SHARE = 0.8
# A layer starts 15 to 40 kernels, at some microseconds each.
LAYER_S = 0.1e-3
# Prefill multiplies matrices at about this part of the peak.
COMPUTE_SHARE = 0.5

# The MLX runtime in a worker: its allocator's cache, kernels and Python.
RUNTIME_RESERVE = 256 * 2**20
# A prefill chunk is at most mlx-lm's step, and small enough for one frame on the wire.
PREFILL_TOKENS = 2048
PREFILL_BYTES = 8 * 2**20
# Arrays of a chunk's hidden size alive at once in a layer: q, k, v, the residual, and an MLP
# or experts several times wider.
WORKSPACE_COPIES = 16
# The most that a logit takes on the wire: some engines send float32, others half of that.
LOGIT_BYTES = 4
# A stage that holds megabytes needs no such reserve: it is at most this part of what it holds.
RESERVE_SHARE = 16
# Of a model of less, weights and caches together, not even its engine's own buffers are counted:
# an empty worker takes more.
TOY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Layout:
    """Sizes of a model in bytes; per layer where a tuple. KV is for all users together.

    head_bytes: all outside the layers. Of them embed_bytes are embeddings, and
    head_active_bytes are read for one token (None: all). layer_active_parameters: None unknown.
    forbidden_cuts: layers that must be on the same stage as the layer before them.
    forbidden_counts: no stage may have so many layers, unless it has all.
    draft_bytes: the part of head_bytes that is a draft model with its KV caches. Of them
    draft_read_bytes are read for one drafted token, and draft_rate of these are right, as assumed,
    where each is a frame of its own; 0: guesses don't fill the pipe.
    hidden_size: numbers of a token's hidden state; 0: other things cross cuts too, or not known.
    lm_head_bytes: norm and lm_head, where the last layer's bytes include them; else 0.
    added_lm_head_bytes: what the last stage needs besides to compute logits; 0: it can't.
    vocabulary: logits of a token; 0: not known.
    workspace_bytes: of a stage's buffers to compute in, where its engine says it; else 0.
    recurrent: layers have states, which can't be trimmed by some tokens. window: tokens of the
    smallest sliding window; 0: none.
    """

    model_type: str
    layer_bytes: tuple[int, ...]
    layer_active_bytes: tuple[int, ...]
    head_bytes: int
    kv_bytes_per_layer: tuple[int, ...]
    context: int
    users: int
    hidden_bytes: int
    quant: str
    max_context: int
    forbidden_cuts: tuple[int, ...] = ()
    forbidden_counts: tuple[int, ...] = ()
    embed_bytes: int = 0
    head_active_bytes: int | None = None
    parameters: int = 0
    layer_active_parameters: tuple[int, ...] | None = None
    engine: str = DEFAULT
    draft_bytes: int = 0
    draft_read_bytes: int = 0
    draft_rate: float = 0.0
    hidden_size: int = 0
    lm_head_bytes: int = 0
    added_lm_head_bytes: int = 0
    vocabulary: int = 0
    workspace_bytes: int = 0
    recurrent: bool = False
    window: int = 0

    def __post_init__(self) -> None:
        counts = {len(self.layer_bytes), len(self.layer_active_bytes), len(self.kv_bytes_per_layer)}
        if counts != {self.layers} or not self.layers or self.users < 1:
            raise InputError(
                f"invalid layout of {self.model_type}: {self.layers} layers, "
                f"{len(self.layer_active_bytes)} active sizes, "
                f"{len(self.kv_bytes_per_layer)} KV sizes, {self.users} users"
            )

    @classmethod
    def from_proto(cls, layout: node_pb2.ModelLayout) -> Layout:
        return cls(
            model_type=layout.model_type,
            layer_bytes=tuple(layout.layer_bytes),
            layer_active_bytes=tuple(layout.layer_active_bytes),
            head_bytes=layout.head_bytes,
            kv_bytes_per_layer=tuple(layout.kv_bytes_per_layer),
            context=layout.context,
            users=layout.users,
            hidden_bytes=layout.hidden_bytes,
            quant=layout.quant,
            max_context=layout.max_context,
            forbidden_cuts=tuple(layout.forbidden_cuts),
            forbidden_counts=tuple(layout.forbidden_counts),
            embed_bytes=layout.embed_bytes,
            head_active_bytes=layout.head_active_bytes or None,
            parameters=layout.parameters,
            layer_active_parameters=tuple(layout.layer_active_parameters) or None,
            engine=layout.engine or DEFAULT,
            hidden_size=layout.hidden_size,
            lm_head_bytes=layout.tail_bytes,
            added_lm_head_bytes=layout.finish_bytes,
            vocabulary=layout.vocabulary,
            workspace_bytes=layout.workspace_bytes,
            recurrent=layout.recurrent,
            window=layout.window,
        )

    def without_lm_head(self) -> Layout:
        """Layout for rings whose head computes the logits: the last layer has no lm_head."""
        return self if not self.lm_head_bytes else self._with_lm_head_bytes(0, self.lm_head_bytes)

    def with_lm_head(self) -> Layout:
        """Layout for rings whose last stage computes the logits."""
        return self if self.lm_head_bytes else self._with_lm_head_bytes(self.added_lm_head_bytes, 0)

    def _with_lm_head_bytes(self, size: int, added: int) -> Layout:
        more = size - self.lm_head_bytes
        active = self.layer_active_bytes
        return replace(
            self,
            layer_bytes=(*self.layer_bytes[:-1], self.layer_bytes[-1] + more),
            layer_active_bytes=(*active[:-1], active[-1] + more),
            lm_head_bytes=size,
            added_lm_head_bytes=added,
        )

    def with_draft(self, draft_bytes: int, read_bytes: int = 0, rate: float = 0.0) -> Layout:
        """Layout with a draft model on the head, whose reads are not those of the model's tokens.

        read_bytes: for a drafted token. rate: see draft_rate.
        """
        return replace(
            self,
            head_bytes=self.head_bytes + draft_bytes,
            head_active_bytes=self.head_read_bytes,
            draft_bytes=draft_bytes,
            draft_read_bytes=read_bytes,
            draft_rate=rate,
        )

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def returned_bytes(self) -> int:
        """Bytes that come back to a head of this variant for a token: hidden state or logits."""
        logits = LOGIT_BYTES * self.vocabulary if self.lm_head_bytes else 0
        return logits or self.hidden_bytes

    @property
    def quantized(self) -> bool:
        return self.quant.startswith(("q", "mxfp", "iq", "tq"))

    @property
    def cpu_share(self) -> float:
        """The part of the usual bandwidth at which a CPU reads this variant's weights."""
        quant = QUANTIZED if self.quantized else self.quant
        return ENGINES[self.engine].cpu_share.get(quant, 1.0)

    @property
    def weight_bytes(self) -> int:
        return sum(self.layer_bytes) + self.head_bytes

    @property
    def kv_bytes(self) -> int:
        return sum(self.kv_bytes_per_layer)

    @property
    def resident_bytes(self) -> tuple[int, ...]:
        """Weights and KV, per layer."""
        both = zip(self.layer_bytes, self.kv_bytes_per_layer, strict=True)
        return tuple(weights + kv for weights, kv in both)

    @property
    def read_bytes(self) -> tuple[float, ...]:
        """Active weights and one user's KV at the full context, per layer."""
        both = zip(self.layer_active_bytes, self.kv_bytes_per_layer, strict=True)
        return tuple(active + kv / self.users for active, kv in both)

    @property
    def head_read_bytes(self) -> int:
        """Bytes outside the layers that are read for one token."""
        return self.head_bytes if self.head_active_bytes is None else self.head_active_bytes

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prefill chunk: one frame on the wire."""
        by_frame = PREFILL_BYTES // max(self.hidden_bytes, 1)
        return max(1, min(self.context, PREFILL_TOKENS, by_frame))

    def reserve(self, resident: int) -> int:
        """Bytes for the runtime and a prefill chunk beside `resident` bytes of weights and KV."""
        return max(min(self.full_reserve, resident // RESERVE_SHARE), self.workspace)

    def capacity(self, usable: int) -> int:
        """The most bytes of weights and KV that fit with their reserve into `usable`."""
        shares, rest = divmod(usable, RESERVE_SHARE + 1)
        scaled = shares * RESERVE_SHARE + min(rest, RESERVE_SHARE - 1)
        most = max(usable - self.full_reserve, scaled)
        return max(0, min(most, usable - self.workspace)) if self.workspace else most

    def usable_on(self, machine: Machine) -> int:
        """Usable bytes of its engine's devices there, less what whole layers leave over on each.

        -1 without the engine.
        """
        if not machine.can(self.engine):
            return -1
        speeds, usable = machine.engines[self.engine], machine.reach(self.engine)
        if len(speeds.devices) < 2:
            return usable
        largest = max(self.resident_bytes)
        return self.needed(devices.capacity_of(speeds, self.capacity, largest))

    def needed(self, resident: int) -> int:
        """Usable bytes that a machine must have to hold so much of weights and KV."""
        return resident + self.reserve(resident)

    @property
    def workspace(self) -> int:
        """Bytes of a stage's buffers to compute in, as they count; 0 where that is not known."""
        return self.workspace_bytes if self.weight_bytes + self.kv_bytes >= TOY_BYTES else 0

    @property
    def full_reserve(self) -> int:
        """The largest reserve in bytes, however much is resident."""
        if self.workspace:
            return RUNTIME_RESERVE + self.workspace
        chunk = min(self.context, PREFILL_TOKENS) * self.hidden_bytes
        return RUNTIME_RESERVE + WORKSPACE_COPIES * min(chunk, PREFILL_BYTES)


def reads(layout: Layout, machine: Machine) -> float:
    """Bytes a second that are read there while decoding, from the engine's fastest device."""
    speeds = machine.engines[layout.engine]
    share = layout.cpu_share if speeds.backend == "cpu" else 1.0
    return BANDWIDTH_SHARE * share * speeds.bandwidth / speeds.slowdown


def decode_seconds(
    layout: Layout, machine: Machine, read_bytes: float, layers: int, resident: float = 0.0
) -> float:
    """Seconds to decode one token through `layers` layers that read `read_bytes`.

    resident: bytes of weights and KV that the stage holds, which may take several devices.
    """
    overhead = machine.engines[layout.engine].slowdown * LAYER_S * layers
    slower = float(devices.slower(machine.engines[layout.engine], layout.capacity, resident))
    return read_bytes / reads(layout, machine) * slower + overhead


def prefill_seconds(
    layout: Layout, machine: Machine, first: int, end: int, tokens: int
) -> float | None:
    """Seconds to prefill a chunk of `tokens` through layers [first, end); None if unknown.

    The operations take their time, or reading the weights once does, if that is longer.
    """
    speeds = machine.engines[layout.engine]
    if layout.layer_active_parameters is None:
        return None
    resident = sum(layout.resident_bytes[first:end])
    compute = devices.compute(speeds, layout.capacity, resident)
    if not compute:
        return None
    operations = 2 * sum(layout.layer_active_parameters[first:end]) * tokens
    weights = sum(layout.layer_bytes[first:end])
    slower = float(devices.slower(speeds, layout.capacity, resident))
    return max(
        operations / (COMPUTE_SHARE * compute),
        weights / (BANDWIDTH_SHARE * speeds.bandwidth) * slower,
    )


@dataclass(frozen=True)
class Stage:
    """Layers [first, end) on a machine. Stage 0 is the head, and holds its bytes too.

    seconds_per_token: of one user. batch_seconds: what each further user of a batch adds.
    chunk_seconds: of a prefill chunk; None if the machine's compute is not known.
    hop_s: to the next stage, or from the last one back to the head.
    has_lm_head: it computes the logits; else the head does.
    shares: its devices; empty if they are not known.
    """

    machine: Machine
    first: int
    end: int
    weight_bytes: int
    kv_bytes: int
    reserve_bytes: int
    head: bool
    seconds_per_token: float
    batch_seconds: float = 0.0
    chunk_seconds: float | None = None
    hop_s: float = 0.0
    hop_measured: bool = False
    engine: str = DEFAULT
    has_lm_head: bool = False
    shares: tuple[devices.Share, ...] = ()

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def free_bytes(self) -> int:
        return self.machine.reach(self.engine) - self.bytes

    @property
    def measured(self) -> bool:
        return self.machine.engines[self.engine].measured


def guessing_seconds(stages: Sequence[Stage], rate: float, draft_s: float = 0.0) -> float:
    """Seconds a token of a lone answer, on average, with guesses that fill the pipe.

    rate: of right ones. A run of these takes one trip for its first token, R seconds, and for each
    other token only the time of the slowest stage, M, the head's draft included: (1-p)*R + p*M a
    token. That is n*R/(R+(n-1)*M) times as fast as plain decode, with n = 1/(1-p) tokens a run.
    """
    trip = sum(stage.seconds_per_token + stage.hop_s for stage in stages)
    return (1 - rate) * trip + rate * _slowest(stages, draft_s)


def _slowest(stages: Sequence[Stage], draft_s: float) -> float:
    head, *others = (stage.seconds_per_token for stage in stages)
    return max([head + draft_s, *others])


@dataclass(frozen=True)
class Plan:
    """A placement that fits, with what it should give. All speeds are predicted.

    gap: how much better, at most, another placement could be; 0 when none can. guess_rate: of right
    guesses, as assumed, of a lone answer whose guesses fill the pipe; 0: none do, or nobody asked.
    draft_s: seconds that the head takes for one.
    """

    objective: Objective
    users: int
    stages: tuple[Stage, ...]
    left_out: tuple[tuple[Machine, str], ...]  # each with the reason
    chunk_tokens: int = 0
    gap: float = 0.0
    guess_rate: float = 0.0
    draft_s: float = 0.0

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines of the stages, the head's first."""
        return tuple(dict.fromkeys(stage.engine for stage in self.stages))

    @property
    def hops_s(self) -> float:
        """Seconds a token spends between machines, once round the ring."""
        return sum(s.hop_s for s in self.stages)

    @property
    def seconds_per_token(self) -> float:
        """Seconds a token takes for a single user."""
        return sum(s.seconds_per_token for s in self.stages) + self.hops_s

    @property
    def tokens_per_s_single(self) -> float:
        return 1 / self.seconds_per_token

    @property
    def guessing_gain(self) -> float:
        """Tokens a second of a lone answer with guesses, in times of those without."""
        guessing = guessing_seconds(self.stages, self.guess_rate, self.draft_s)
        return max(self.seconds_per_token / guessing, 1.0)

    @property
    def guessing_frames(self) -> int:
        """Frames of a lone answer in flight, beyond which more would only wait."""
        return max(1, int(self.seconds_per_token / _slowest(self.stages, self.draft_s)))

    @property
    def tokens_per_s_aggregate(self) -> float:
        """Tokens a second of all users, in a lane for each stage (or user, if fewer)."""
        lanes = min(self.users, len(self.stages))
        batch = self.users / lanes
        steps = [s.seconds_per_token + (batch - 1) * s.batch_seconds for s in self.stages]
        return self.users / max(sum(steps) + self.hops_s, lanes * max(steps))

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prefill speed of a prompt of many chunks, pipelined; None if a compute is unknown."""
        seconds = [s.chunk_seconds for s in self.stages if s.chunk_seconds is not None]
        return self.chunk_tokens / max(seconds) if len(seconds) == len(self.stages) else None

    @property
    def slowest(self) -> Stage:
        return max(self.stages, key=lambda s: s.seconds_per_token)

    @property
    def bottleneck(self) -> str:
        """The resource that limits the plan's speed, in a phrase with its share of the time."""
        slowest = self.slowest
        stage_ms, total_ms = slowest.seconds_per_token * 1e3, self.seconds_per_token * 1e3
        if self.objective == "throughput":
            return f"memory bandwidth of {slowest.machine.name}, the slowest stage"
        if self.hops_s > slowest.seconds_per_token:
            return f"the {len(self.stages)} hops, {self.hops_s * 1e3:.3g} of {total_ms:.3g} ms"
        if len(self.stages) == 1:
            return f"memory bandwidth of {slowest.machine.name}"
        return f"memory bandwidth of {slowest.machine.name}, {stage_ms:.3g} of {total_ms:.3g} ms"
