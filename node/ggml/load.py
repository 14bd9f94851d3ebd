"""From a GGUF, whole or in part, to a stage that is ready to compute."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from node.ggml.cut import Gguf
from node.ggml.cutting.architectures import KNOWN
from node.ggml.cutting.caches import host_bytes
from node.ggml.cutting.checked import check_layer_numbers, check_metadata
from node.ggml.cutting.kinds import (
    known,
    layer_count,
    layer_kinds,
    period,
    recurrent_layers,
)
from node.ggml.cutting.metadata import LEADING
from node.ggml.embedding import Embedding, Lookup
from node.ggml.front import GgmlFront
from node.ggml.graph_check import check_graph
from node.ggml.layers import Layers, Sizes
from node.ggml.stage import GgmlStage
from node.ggml.stage_file import Part, StageFile
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.context import longest_context
from unicluster.checkpoints.gguf import Header, read_header
from unicluster.errors import InputError

# Where nobody says how much context there is to be.
DEFAULT_CONTEXT = 8192
# llama.cpp rounds the tokens of a KV cache up to such. One token's values lie far apart there: if
# that is a multiple of 4 KiB they share a few lines of the processor's caches, and a prompt takes
# an eighth longer.
CELLS = 256
UNLUCKY_CELLS = 2048
# States beside those of the users: prefix caches, and sources of copies.
SPARE_STATES = 4
# Prefix caches may be many, where they take no more memory than their tokens do.
SEQUENCES_PER_USER = 16
# Of sequences without states that wait on the host, in a burst of requests: a part of the reserve
# that a plan keeps for each stage.
BURST_BYTES = 64 * 2**20
THREADS_ENV = "UNICLUSTER_GGML_THREADS"
MOST_THREADS = 1024
# How long numbers of threads are tried out before the first answer, at most.
TRIED_S = 0.5
# Names of tensors that layers of a kind have in common: some quantizations have scales beside the
# matrices of some layers only.
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Loaded:
    """front: of stage 0, for the head. workspace_bytes: of the buffers that it computes in."""

    stage: GgmlStage
    front: GgmlFront | None
    weight_bytes: int
    workspace_bytes: int


def open_gguf(checkpoint: Checkpoint) -> Gguf:
    """Raises InputError for damaged headers, and where a part or a tensor is missing from them.

    The bytes of the tensors need not be here.
    """
    root = checkpoint.root
    headers = {name: read_header(root / name) for name in checkpoint.manifest.weights}
    check_parts(root, headers)
    first, header = next(iter(headers.items()))
    check_metadata(root / first, header)
    check_layer_numbers(root / first, headers.values())
    gguf = Gguf(headers)
    if gguf.header.architecture in KNOWN:
        check_layers(root, headers)
    return gguf


def load(gguf: Gguf, folder: Path, file: StageFile | Path, part: Part) -> Loaded:
    """Loads the stage in `file`, which it holds if it was made; `folder` has the model's own files.

    Raises StageError when llama.cpp can't load it.
    """
    sizes = stage_sizes(gguf, part)
    layers = Layers(file if isinstance(file, Path) else file.path, sizes)
    check_graph(layers, gguf, part)
    layers.try_threads(TRIED_S)
    embedding: Lookup | None = None
    if part.first == 0:
        embedding = Lookup(gguf) if sizes.tokens else Embedding(gguf, folder)
    stage = GgmlStage(layers, embedding, file)
    front = GgmlFront(layers, stage, is_whole=part.has_lm_head) if embedding is not None else None
    return Loaded(stage, front, layers.weight_bytes, layers.workspace_bytes)


def stage_sizes(gguf: Gguf, part: Part) -> Sizes:
    """Sizes of a stage's layers and caches, as llama.cpp is told them."""
    rule = known(gguf.header)
    waiting = host_bytes(*cache_sizes(gguf, part.context or DEFAULT_CONTEXT, part.users))
    return Sizes(
        layers=part.end - part.first,
        hidden=gguf.width,
        inputs=gguf.width if part.first else gguf.hidden_size,
        tokens=gguf.takes_tokens(part.first, part.end),
        cells=cells(part.context or DEFAULT_CONTEXT, part.users),
        vocabulary=gguf.vocabulary if part.has_lm_head else 0,
        sequences=SEQUENCES_PER_USER * (part.users + 1),
        states=2 * part.users + SPARE_STATES,
        threads=threads(),
        entry=gguf.entry(part.first, part.end),
        exit=rule.exit,
        exact=gguf.is_exact,
        heads=gguf.heads,
        devices=part.devices,
        adaptive=not _stated_threads(),
        host_bytes=sum(waiting[part.first : part.end]) or BURST_BYTES,
    )


def cells(context: int, users: int) -> int:
    """Cells of a KV cache: tokens of all users together, rounded up."""
    rounded = -(-context * users // CELLS) * CELLS
    return rounded if rounded % UNLUCKY_CELLS else rounded + CELLS


def cache_sizes(gguf: Gguf, context: int, users: int) -> tuple[Header, int, int, int]:
    """Header, cells, states, and bytes of a cached number: arguments of caches.cache_bytes."""
    number = 4 if gguf.is_exact else 2
    return gguf.header, cells(context, users), 2 * users + SPARE_STATES, number


def threads() -> int:
    """Threads that a stage computes with, at most."""
    return _stated_threads() or cores()


def _stated_threads() -> int:
    """0: none are stated. Raises InputError for what is no number of threads."""
    stated = os.environ.get(THREADS_ENV) or "0"
    if not (stated.isascii() and stated.isdigit() and int(stated) <= MOST_THREADS):
        raise InputError(f"{THREADS_ENV}={stated[:20]!r}: must be from 0 to {MOST_THREADS}")
    return int(stated)


def cores() -> int:
    """Cores this process may use; llama.cpp by itself takes four threads, whatever there are."""
    real = psutil.cpu_count(logical=False) or 1
    return min(real, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else real


def context_limit(gguf: Gguf) -> int:
    """The most tokens the model is made for; 0 when it doesn't say."""
    arch = gguf.header.arch
    scaling = {
        "type": arch("rope.scaling.type", "none"),
        "factor": arch("rope.scaling.factor", 0),
        "original_max_position_embeddings": arch("rope.scaling.original_context_length", 0),
    }
    return longest_context(int(arch("context_length", 0)), scaling)


def check_parts(folder: Path, headers: Mapping[str, Header]) -> None:
    """Raises InputError unless the files are all parts of one GGUF, in their order.

    headers: by the names of the files.
    """
    tensors = sum(len(header.tensors) for header in headers.values())
    for place, (name, header) in enumerate(headers.items()):
        count = int(header.get("split.count", 0)) or 1
        number = int(header.get("split.no", 0))
        if (count, number) != (len(headers), place):
            raise InputError(
                f"{folder / name}: part {number + 1} of {count} of a split GGUF, and here are "
                f"{len(headers)}: keep all parts beside one another under their own names "
                "(NAME-00001-of-00003.gguf), or join them by llama-gguf-split --merge; cat doesn't"
            )
        stated = int(header.get("split.tensors.count", 0))
        if stated and stated != tensors:
            raise InputError(
                f"{folder / name}: {tensors} tensors instead of {stated}: copy all parts again"
            )


def check_layers(folder: Path, headers: Mapping[str, Header]) -> None:
    """Raises InputError where a layer has fewer tensors than others of its kind, or none.

    Raises StageError for an architecture of which that is not known.
    """
    first, header = next(iter(headers.items()))
    layers: list[set[str]] = [set() for _ in range(layer_count(header))]
    for each in headers.values():
        for name in each.tensors:
            block, _, tensor = name.removeprefix("blk.").partition(".")
            if name.startswith("blk.") and block.isdigit() and int(block) < len(layers):
                layers[int(block)].add(tensor)
    by_kind: dict[tuple[object, ...], Counter[frozenset[str]]] = {}
    kinds = _kinds(header, len(layers))
    essential = [frozenset(t for t in layer if t.endswith(_SUFFIXES)) for layer in layers]
    for kind, tensors in zip(kinds, essential, strict=True):
        by_kind.setdefault(kind, Counter())[tensors] += 1
    for layer, (kind, tensors) in enumerate(zip(kinds, essential, strict=True)):
        usual = max(by_kind[kind], key=lambda names: (by_kind[kind][names], len(names)))
        missing = sorted(usual - tensors) if tensors < usual or not tensors else []
        if missing or not tensors:
            named = f"blk.{layer}.{missing[0]}" if missing else f"a tensor of layer {layer}"
            raise InputError(
                f"{folder / first}: there is no {named} in it: the GGUF is not complete; copy "
                "all of it again"
            )


def _kinds(header: Header, count: int) -> list[tuple[object, ...]]:
    """Properties by which layers of a model may differ, each."""
    flags = [*layer_kinds(header).values(), recurrent_layers(header)]
    arrays = [
        value.read()
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.") and (value.length or 0) >= count
    ]
    leading = [int(header.arch(key, 0)) for key in LEADING]
    groups = period(header)
    return [
        (
            layer % groups,
            *(layer < number for number in leading),
            *(values[layer] for values in (*flags, *arrays)),
        )
        for layer in range(count)
    ]
