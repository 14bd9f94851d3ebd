"""Activations that have to cross a cut between two layers, and where cuts are possible."""

from collections.abc import Iterator
from dataclasses import dataclass

from node.mlx.dataflow import (
    Dataflow,
    FromCache,
    FromEmbedding,
    FromInside,
    FromResult,
    FromWeight,
    Source,
)
from node.mlx.tree import Path

# Path of the array in a layer's output, where the layer returns a single array.
RESULT: Path = (0,)


@dataclass(frozen=True)
class Activations:
    """Arrays that the layers from `cut` on need of those before it.

    paths: needed arrays in the output of layer cut - 1.
    results: needed arrays in the output of earlier layers.
    embeddings: outputs of embeddings, by their index in the dataflow.
    caches: caches of layers before the cut that later ones read. Their updates are sent, and
        written to a copy on the other side.
    reason: why the model can't be cut here; empty if it can.
    """

    cut: int
    paths: frozenset[Path]
    results: tuple[FromResult, ...]
    embeddings: tuple[int, ...]
    caches: tuple[int, ...]
    reason: str


def activations_at(dataflow: Dataflow, cut: int) -> Activations:
    """Activations that cross the cut before layer `cut`; after the last layer, to the head."""
    sources = sorted(set(_needed(dataflow, cut)), key=repr)
    results = [s for s in sources if isinstance(s, FromResult)]
    caches = [s.entry for s in sources if isinstance(s, FromCache)]
    last = dataflow.results[cut - 1]
    paths = {s.path for s in results if s.layer == cut - 1} - set(last.cache_outputs)
    return Activations(
        cut=cut,
        paths=frozenset(paths | {last.token_path} if last.token_path else paths),
        results=tuple(s for s in results if s.layer < cut - 1),
        embeddings=tuple(s.index for s in sources if isinstance(s, FromEmbedding)),
        caches=tuple(caches),
        reason=_reason(dataflow, cut, sources),
    )


def token_bytes(dataflow: Dataflow) -> int:
    """The most bytes that cross any cut for one token."""
    most = 0
    for cut in range(1, len(dataflow.layers) + 1):
        activations = activations_at(dataflow, cut)
        embeddings = [dataflow.embeddings[index] for index in activations.embeddings]
        size = sum(dataflow.results[cut - 1].token_bytes[path] for path in activations.paths)
        size += sum(dataflow.results[s.layer].token_bytes[s.path] for s in activations.results)
        size += sum(embedding.dims * embedding.dtype.size for embedding in embeddings)
        most = max(most, size)
    return most


def hidden_size(dataflow: Dataflow) -> int:
    """Numbers of a token that cross every cut; 0 where they are not one hidden state."""
    embedding = dataflow.embeddings[0]
    size = embedding.dims * embedding.dtype.size
    for cut in range(1, len(dataflow.layers) + 1):
        activations, result = activations_at(dataflow, cut), dataflow.results[cut - 1]
        more = activations.results or activations.embeddings or activations.caches
        if more or activations.paths != {RESULT} or result.token_bytes[RESULT] != size:
            return 0
    return embedding.dims


def forbidden_cuts(dataflow: Dataflow) -> dict[int, str]:
    """The layers before which the model can't be cut, each with the reason."""
    reasons = {cut: activations_at(dataflow, cut).reason for cut in range(1, len(dataflow.layers))}
    return {cut: reason for cut, reason in reasons.items() if reason}


def lm_head_modules(dataflow: Dataflow) -> frozenset[str] | None:
    """The modules outside the layers, by their paths, that make logits of the last hidden state.

    None where logits are made of something else too, or more than that crosses cuts.
    """
    last = len(dataflow.layers) - 1
    modules = {source.module for source in dataflow.needs[-1] if isinstance(source, FromWeight)}
    others = [source for source in dataflow.needs[-1] if not isinstance(source, FromWeight)]
    alone = all(isinstance(source, FromResult) and source.layer == last for source in others)
    return frozenset(modules) if alone and hidden_size(dataflow) else None


def _needed(dataflow: Dataflow, cut: int) -> Iterator[Source]:
    """Sources before `cut` from which the layers after it were computed."""
    for layer, sources in enumerate(dataflow.needs[cut:], start=cut):
        for source in sources:
            if isinstance(source, FromEmbedding):
                # The head has the tokens, and what follows the layers runs there.
                if layer < len(dataflow.layers):
                    yield source
            elif isinstance(source, FromWeight):
                continue  # it is wherever it is needed
            elif isinstance(source, FromCache):
                if _owner(dataflow, source.entry) < cut:
                    yield source
            elif source.layer < cut:
                outputs = dataflow.results[source.layer].cache_outputs
                if isinstance(source, FromResult) and source.path in outputs:
                    yield FromCache(outputs[source.path][0])
                else:
                    yield source


def _owner(dataflow: Dataflow, entry: int) -> int:
    return next(layer for layer, entries in enumerate(dataflow.cache_entries) if entry in entries)


def _reason(dataflow: Dataflow, cut: int, sources: list[Source]) -> str:
    for source in sources:
        if isinstance(source, FromEmbedding) and dataflow.embeddings[source.index].called > 1:
            return "later layers read an embedding that runs more than once"
        if isinstance(source, FromInside):
            return f"later layers read an inner value of layer {source.layer}"
        if isinstance(source, FromCache):
            owner = _owner(dataflow, source.entry)
            if source.entry not in dataflow.writers:
                return f"later layers share the state of layer {owner}"
            if len(dataflow.writers[source.entry]) > 1:
                both = " and ".join(map(str, dataflow.writers[source.entry]))
                return f"layers {both} share a cache"
        if isinstance(source, FromResult):
            shared = source.path[0] == 0 or source.path[1] in dataflow.shared_arguments
            if not shared:
                return f"layer {source.layer} outputs something that only some layers see"
    if cut < len(dataflow.layers) and dataflow.results[cut - 1].token_path is None:
        return f"the output of layer {cut - 1} has no axis of tokens"
    return ""
