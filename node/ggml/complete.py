"""Whether a GGUF has all tensors of its model: by its parts, and layer by layer."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from node.ggml.architectures import INDEXER_KEY, RECURRENT_KEY, layer_count, layer_kinds
from unicluster.checkpoints.gguf import Header
from unicluster.errors import InputError

# Some quantizations have scales beside the matrices of some layers only.
_SUFFIXES = (".weight", ".bias")


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
    by_kind: dict[tuple[bool, ...], Counter[frozenset[str]]] = {}
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


def _kinds(header: Header, count: int) -> list[tuple[bool, ...]]:
    """What layers of a model may differ by, each."""
    flags = layer_kinds(header)
    dense = int(header.arch("leading_dense_block_count", 0))
    recurrent, indexed = (flags.get(key, []) for key in (RECURRENT_KEY, INDEXER_KEY))
    return [
        (layer < dense, layer in _numbers(recurrent), layer in _numbers(indexed))
        for layer in range(count)
    ]


def _numbers(flags: list[bool]) -> set[int]:
    return {number for number, flag in enumerate(flags) if flag}
