"""What has to cross a cut between two layers, and whether a cut there can be right."""

from collections.abc import Iterator
from dataclasses import dataclass

from node.mlx.dataflow import (
    FromCache,
    FromEmbedding,
    FromInside,
    FromResult,
    FromWeight,
    Source,
    Trace,
)
from node.mlx.tree import Path

# Where what a layer returns is in the tree that it hands on, if that is one array.
RESULT: Path = (0,)


@dataclass(frozen=True)
class Crossing:
    """What the layers from `cut` on need of those before it.

    paths: the arrays of what layer cut - 1 hands on that are needed.
    results: arrays that earlier layers handed on.
    embeddings: outputs of embeddings, by their index in the trace.
    caches: caches of layers before the cut that later ones read. What is written to them is
        sent, and written to a copy on the other side.
    reason: why the model can't be cut here; empty if it can.
    """

    cut: int
    paths: frozenset[Path]
    results: tuple[FromResult, ...]
    embeddings: tuple[int, ...]
    caches: tuple[int, ...]
    reason: str


def crossing(found: Trace, cut: int) -> Crossing:
    """What crosses the cut before layer `cut`; after the last layer, what goes to the head."""
    sources = sorted(set(_needed(found, cut)), key=repr)
    results = [s for s in sources if isinstance(s, FromResult)]
    caches = [s.entry for s in sources if isinstance(s, FromCache)]
    last = found.results[cut - 1]
    paths = {s.path for s in results if s.layer == cut - 1} - set(last.cache_outputs)
    return Crossing(
        cut=cut,
        paths=frozenset(paths | {last.token_path} if last.token_path else paths),
        results=tuple(s for s in results if s.layer < cut - 1),
        embeddings=tuple(s.index for s in sources if isinstance(s, FromEmbedding)),
        caches=tuple(caches),
        reason=_reason(found, cut, sources),
    )


def token_bytes(found: Trace) -> int:
    """The most bytes that cross any cut for one token."""
    most = 0
    for cut in range(1, len(found.layers) + 1):
        across = crossing(found, cut)
        embeddings = [found.embeddings[index] for index in across.embeddings]
        size = sum(found.results[cut - 1].token_bytes[path] for path in across.paths)
        size += sum(found.results[s.layer].token_bytes[s.path] for s in across.results)
        size += sum(embedding.dims * embedding.dtype.size for embedding in embeddings)
        most = max(most, size)
    return most


def hidden_size(found: Trace) -> int:
    """Numbers of a token that cross every cut; 0 where they are not one hidden state."""
    embedding = found.embeddings[0]
    size = embedding.dims * embedding.dtype.size
    for cut in range(1, len(found.layers) + 1):
        across, result = crossing(found, cut), found.results[cut - 1]
        more = across.results or across.embeddings or across.caches
        if more or across.paths != {RESULT} or result.token_bytes[RESULT] != size:
            return 0
    return embedding.dims


def forbidden_cuts(found: Trace) -> dict[int, str]:
    """The layers before which the model can't be cut, each with the reason."""
    reasons = {cut: crossing(found, cut).reason for cut in range(1, len(found.layers))}
    return {cut: reason for cut, reason in reasons.items() if reason}


def finishing(found: Trace) -> frozenset[str] | None:
    """The modules outside the layers, by their paths, that make logits of the last hidden state.

    None where logits are made of something else too, or more than that crosses cuts.
    """
    last = len(found.layers) - 1
    modules = {source.module for source in found.needs[-1] if isinstance(source, FromWeight)}
    others = [source for source in found.needs[-1] if not isinstance(source, FromWeight)]
    alone = all(isinstance(source, FromResult) and source.layer == last for source in others)
    return frozenset(modules) if alone and hidden_size(found) else None


def _needed(found: Trace, cut: int) -> Iterator[Source]:
    """What layers from `cut` on were computed from and that was made before it."""
    for layer, sources in enumerate(found.needs[cut:], start=cut):
        for source in sources:
            if isinstance(source, FromEmbedding):
                # The head has the tokens, and what follows the layers runs there.
                if layer < len(found.layers):
                    yield source
            elif isinstance(source, FromWeight):
                continue  # it is wherever it is needed
            elif isinstance(source, FromCache):
                if _owner(found, source.entry) < cut:
                    yield source
            elif source.layer < cut:
                outputs = found.results[source.layer].cache_outputs
                if isinstance(source, FromResult) and source.path in outputs:
                    yield FromCache(outputs[source.path][0])
                else:
                    yield source


def _owner(found: Trace, entry: int) -> int:
    return next(layer for layer, entries in enumerate(found.cache_entries) if entry in entries)


def _reason(found: Trace, cut: int, sources: list[Source]) -> str:
    for source in sources:
        if isinstance(source, FromEmbedding) and found.embeddings[source.index].called > 1:
            return "later layers read an embedding that runs more than once"
        if isinstance(source, FromInside):
            return f"later layers read what layer {source.layer} keeps to itself"
        if isinstance(source, FromCache):
            owner = _owner(found, source.entry)
            if source.entry not in found.writers:
                return f"later layers share the state of layer {owner}"
            if len(found.writers[source.entry]) > 1:
                both = " and ".join(map(str, found.writers[source.entry]))
                return f"layers {both} share a cache"
        if isinstance(source, FromResult):
            shared = source.path[0] == 0 or source.path[1] in found.shared_arguments
            if not shared:
                return f"layer {source.layer} hands on something that only some layers see"
    if cut < len(found.layers) and found.results[cut - 1].token_path is None:
        return f"what layer {cut - 1} hands on has no axis of tokens"
    return ""
